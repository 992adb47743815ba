"""Break a sound backend in one place after another, and see which test of the suite notices.

    python packages/mindprint-testing/tests/defects.py          # the test that should catch each defect
    python packages/mindprint-testing/tests/defects.py --all    # every test that does, which takes minutes

Each defect is an edit of the one module of examples/mindprint-hello. Every edited module is installed as a backend into
a folder, and tested like any other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

EXAMPLE = Path(__file__).parents[3] / "examples" / "mindprint-hello" / "src" / "mindprint_hello"


@dataclass(frozen=True)
class Defect:
    """A mistake: its name, the test that must catch it, and the edits `(old, new)` that make it.

    `claims` are capabilities that the defective backend claims, in addition to those of the example.
    """

    name: str
    caught_by: str
    edits: tuple[tuple[str, str], ...]
    claims: tuple[str, ...] = ()

    def applied(self, source: str) -> str:
        for old, new in self.edits:
            if source.count(old) != 1:
                raise ValueError(f"{self.name}: {old!r} occurs {source.count(old)} times in the example, not once")
            source = source.replace(old, new)
        return source


def defect(name: str, caught_by: str, *edits: tuple[str, str], claims: tuple[str, ...] = ()) -> Defect:
    return Defect(name, f"test_{caught_by}", edits, claims)


def with_largest_weight(name: str, of_one: str) -> Defect:
    """Return a defect that adds the optional hook, which the example has not, with an expression of `weight`."""
    end = "    return digest.hexdigest()\n"
    hook = (
        f"def mindprint_largest_weight(model):\n    return float(max({of_one} for weight in model.weights.values()))\n"
    )
    return defect(name, "the_largest_weight_is_that_of_the_folder", (end, f"{end}\n\n@hookimpl\n{hook}"))


SFT_GRADIENT = "sft_gradients_by_finite_differences"
DPO_GRADIENT = "preference_gradients_by_finite_differences"
MERGED = "an_adapter_is_what_merging_it_would_be"

DEFECTS = (
    # The backend's account of itself, and loading.
    defect(
        "an accelerator behind the CPU",
        "auto_can_choose_a_device",
        ('"hello", (cpu,), able', '"hello", (cpu, DeviceInfo("npu", None, accelerator=True)), able'),
    ),
    defect(
        "a device that cannot be used, without a reason",
        "devices_are_stated",
        ('"hello", (cpu,), able', '"hello", (cpu, DeviceInfo("npu", " ")), able'),
    ),
    defect(
        "packed weights in another order",
        "packed_weights_are_cores_numbers",
        (
            "    if missing :=",
            "    if spec.quantization:\n        weights[UP] = weights[UP][:, ::-1]\n    if missing :=",
        ),
    ),
    defect(
        "a capability that it lacks",
        "capabilities_are_those_claimed_here",
        ('{"sampling", "streaming", *', '{"dropout", "streaming", *'),
    ),
    defect(
        "the framework is imported with the plugin",
        "importing_the_plugin_imports_no_framework",
        ('{"numpy": np.__version__}', '{"safetensors": "0"}'),
        ("import numpy as np\n", "import numpy as np\nimport safetensors.numpy  # noqa: F401\n"),
    ),
    defect("half of the parameters", "facts_of_a_load", ("spec.dtype, elements,", "spec.dtype, elements // 2,")),
    defect("sites with in and out exchanged", "sites_are_the_folders_modules", (".shape[::-1])", ".shape)")),
    defect(
        "missing weights become zeros",
        "missing_weights_are_refused",
        (
            "        raise ModelError(f\"{spec.path}: the weights of {', '.join(sorted(missing))} are missing\")\n",
            "        weights |= {name: np.zeros((64, 16), np.float32) for name in missing}\n",
        ),
    ),
    defect(
        "any architecture is taken for its own",
        "an_unknown_architecture_is_refused",
        ('if kind != "hello":', 'if kind == "llama":'),
    ),
    defect(
        "a digest of rounded weights",
        "the_digest_sees_one_changed_element",
        (".tobytes())", ".astype(np.float16).tobytes())"),
    ),
    defect(
        "the base trains with its adapter",
        "the_digest_is_of_the_base_alone",
        (
            "    model.steps += 1\n",
            "    model.steps += 1\n    model.weights[DOWN] = np.float32(1.01) * model.weights[DOWN]\n",
        ),
    ),
    defect(
        "a vocabulary larger than the table",
        "facts_of_a_load",
        ("elements, len(weights[HEAD]))", "elements, 10**6)"),
    ),
    defect(
        "a negative number of parameters",
        "facts_of_a_load",
        ("spec.dtype, elements,", "spec.dtype, -elements,"),
    ),
    defect(
        "a site listed twice",
        "sites_are_the_folders_modules",
        ("for name in SITES]", "for name in (*SITES, UP)]"),
    ),
    defect(
        "sites are names",
        "sites_are_the_folders_modules",
        ('[AdapterSite(name, "linear", *model.weights[name].shape[::-1]) for', "[name for"),
    ),
    defect("no answer to a question", "the_digest_is_of_the_base_alone", ("    return digest.hexdigest()\n", "")),
    with_largest_weight("a largest weight that passes over NaN", "np.nanmax(np.abs(weight))"),
    with_largest_weight("a largest weight without negative ones", "weight.max()"),
    # Adapters.
    defect("alpha is taken for the scale", MERGED, ("adapter.config.scale(site) * (b", "adapter.config.alpha * (b")),
    defect(
        "one scale for all sites",
        MERGED,
        ("adapter.config.scale(site) * (b", "adapter.config.alpha / adapter.config.r * (b"),
    ),
    defect(
        "a site that has no effect",
        "each_site_alone_is_what_merging_it_would_be",
        ("site not in adapter.tensors", "site == UP"),
    ),
    defect(
        "adapter=False is ignored",
        "adapter_off_is_the_base_bit_for_bit",
        ("adapter and model.adapter is not None", "model.adapter is not None"),
    ),
    defect(
        "a second adapter replaces the first",
        "a_second_adapter_is_refused",
        ("if model.adapter is not None:", "if False:"),
    ),
    defect(
        "factors of any shape",
        "an_adapter_that_does_not_fit_is_refused",
        (" or (len(b), a.shape[1]) != model.weights[site].shape", ""),
    ),
    defect("dropout is ignored", "dropout_that_is_not_claimed_is_refused", ("if adapter.config.dropout:", "if False:")),
    defect(
        "an error of Python without an adapter",
        "hooks_that_need_an_adapter_say_so",
        ('raise AdapterError("the model has no adapter: inject one first")', 'raise KeyError("adapter")'),
    ),
    defect(
        "a negative number of trained elements",
        "facts_of_an_injection",
        (
            "AdapterFacts(tuple(adapter.tensors), adapter.elements)",
            "AdapterFacts(tuple(adapter.tensors), -adapter.elements)",
        ),
    ),
    defect(
        "sites as one text",
        "facts_of_an_injection",
        ("AdapterFacts(tuple(adapter.tensors),", 'AdapterFacts(", ".join(adapter.tensors),'),
    ),
    # Log-probs.
    defect(
        "no softmax",
        "probabilities_of_all_tokens_sum_to_one",
        (" - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))", ""),
    ),
    defect(
        "each token is predicted from itself",
        "probabilities_of_all_tokens_sum_to_one",
        ("np.take_along_axis(self.log_probs[:, :-1]", "np.take_along_axis(self.log_probs[:, 1:]"),
    ),
    defect(
        "attention that is not causal",
        "later_tokens_do_not_matter_and_earlier_ones_do",
        ("np.cumsum(seen, axis=1) / np.arange(1, tokens.shape[1] + 1)[:, None]", "seen.mean(axis=1, keepdims=True)"),
    ),
    defect(
        "the prompt is not seen",
        "later_tokens_do_not_matter_and_earlier_ones_do",
        ("np.cumsum(seen, axis=1) / np.arange(1, tokens.shape[1] + 1)[:, None]", "seen"),
    ),
    defect(
        "statistics over the batch",
        "padding_and_neighbours_change_nothing",
        ("self.z = np.tanh(self.x @ ", "self.z = np.tanh((self.x - self.x.mean(axis=(0, 1))) @ "),
    ),
    defect(
        "values outside the mask",
        "log_probs_outside_the_mask_are_zero",
        ("np.where(batch.loss_mask, ", "np.where(True, "),
    ),
    defect(
        "log-probs with another sign",
        "a_fresh_adapter_changes_nothing",
        ("return np.where(batch.loss_mask, _Pass", "return -np.where(batch.loss_mask, _Pass"),
    ),
    defect(
        "NaN for a token",
        "padding_and_neighbours_change_nothing",
        ("adapter=adapter).picked, 0)", "adapter=adapter).picked * [*[1] * (batch.tokens.shape[1] - 1), np.nan], 0)"),
    ),
    defect(
        "log-probs of another shape",
        "a_fresh_adapter_changes_nothing",
        ("adapter=adapter).picked, 0).astype(np.float32)", "adapter=adapter).picked, 0).astype(np.float32)[:, 1:]"),
    ),
    # SFT.
    defect(
        "a loss 1.3 times as large",
        "the_sft_loss_is_cores",
        ("StepMetrics(loss, _apply", "StepMetrics(1.3 * loss, _apply"),
    ),
    defect(
        "a loss as text",
        "the_sft_loss_is_cores",
        ("StepMetrics(loss, _apply", "StepMetrics(str(loss), _apply"),
    ),
    defect(
        "metrics as a dict",
        "the_sft_loss_is_cores",
        (
            "return StepMetrics(loss, _apply(model, gradients, update))",
            'return {"loss": loss, "grad_norm": _apply(model, gradients, update)}',
        ),
    ),
    defect(
        "a gradient norm below 0",
        "the_stated_norm_is_that_of_the_gradient",
        ("StepMetrics(loss, _apply(model, gradients, update))", "StepMetrics(loss, -_apply(model, gradients, update))"),
    ),
    defect(
        "every step is skipped in float32",
        "training_lowers_the_loss_and_leaves_the_base_alone",
        ("StepMetrics(loss, _apply(model, gradients, update))", "StepMetrics(loss, 1.0, skipped=True)"),
    ),
    defect(
        "prompt tokens count", "the_sft_loss_is_cores", ("pass_.picked[batch.loss_mask].sum()", "pass_.picked.sum()")
    ),
    defect(
        "its own normalizer",
        "the_normalizer_is_the_updates",
        ("max(update.tokens, 1)", "max(sum(batch.loss_tokens for batch in batches), 1)"),
    ),
    defect("a mean over no tokens", "rows_that_ask_nothing_add_nothing", ("max(update.tokens, 1)", "update.tokens")),
    defect("A has no gradient", SFT_GRADIENT, ("gradients[site][0] += b.T @ by_weight", "pass")),
    defect("a derivative left out", SFT_GRADIENT, (" * (1 - self.z**2)", "")),
    defect("a gradient without the scale", SFT_GRADIENT, ("adapter.config.scale(site) * np.einsum", "np.einsum")),
    defect(
        "each micro-batch's gradient replaces the last",
        "eight_micro_batches_are_one_batch_of_eight",
        ("gradients[site][0] +=", "gradients[site][0] ="),
        ("gradients[site][1] +=", "gradients[site][1] ="),
    ),
    defect(
        "a step compiled with the first adapter",
        "every_step_sees_the_adapter_as_it_is_now",
        (
            "pass_ = _Pass(model, batch.tokens, adapter=True)",
            (
                "kept = HelloModel(model.weights, vars(model).setdefault('_kept', model.adapter))\n"
                "        pass_ = _Pass(kept, batch.tokens, adapter=True)"
            ),
        ),
    ),
    defect(
        "updates do not reach the adapter that computes",
        "training_lowers_the_loss_and_leaves_the_base_alone",
        (
            "self.model.adapter if self.adapted",
            'vars(self.model).setdefault("_kept", self.model.adapter) if self.adapted',
        ),
    ),
    defect(
        "inputs are written to",
        "inputs_are_not_written_to",
        ("    loss, gradients, tokens =", "    batches[0].tokens[:, 0] = 0\n    loss, gradients, tokens ="),
    ),
    defect(
        "noise from NumPy's generator",
        "numpys_own_generator_plays_no_part",
        ("    model.steps += 1\n", "    model.steps += 1\n    norm *= 1 + 1e-9 * np.random.random()\n"),
    ),
    defect(
        "optimizer state in the module",
        "two_models_side_by_side_do_not_meet",
        ("@dataclass\nclass HelloModel", "SHARED: Factors = {}\n\n\n@dataclass\nclass HelloModel"),
        ("first: Factors = field(default_factory=dict)", "first: Factors = field(default_factory=lambda: SHARED)"),
    ),
    # The optimizer.
    defect("no bias correction", "adamw_is_torchs", ("mean / (1 - one**step)", "mean")),
    defect(
        "eps inside the root",
        "adamw_is_torchs",
        ("(np.sqrt(square / (1 - two**step)) + settings.eps)", "np.sqrt(square / (1 - two**step) + settings.eps)"),
    ),
    defect("decay without the learning rate", "adamw_is_torchs", ("(1 - rate * decay)", "(1 - decay)")),
    defect("the second moment of a first", "adamw_is_torchs", ("(1 - two) * gradient**2", "(1 - two) * gradient")),
    defect("nothing is clipped", "gradients_are_clipped_by_their_global_norm", ("(part * factor for", "(part for")),
    defect(
        "small gradients are scaled up",
        "gradients_are_clipped_by_their_global_norm",
        ("min(1.0, update.max_grad_norm / (norm + 1e-6))", "update.max_grad_norm / (norm + 1e-6)"),
    ),
    defect(
        "the norm after clipping",
        "the_stated_norm_is_that_of_the_gradient",
        ("    return norm\n", "    return norm * factor\n"),
    ),
    defect(
        "its own learning rate",
        "a_learning_rate_of_zero_changes_no_factor",
        (" - rate * change", " - 1e-2 * change"),
    ),
    # Preference.
    defect(
        "a turned sign",
        "training_prefers_the_chosen_answer",
        ("np.concatenate([by_chosen, by_rejected])", "-np.concatenate([by_chosen, by_rejected])"),
    ),
    defect(
        "the rejected answer has no gradient",
        DPO_GRADIENT,
        ("[by_chosen, by_rejected]", "[by_chosen, 0 * by_rejected]"),
    ),
    defect(
        "the reference is ignored",
        "a_policy_that_is_its_reference_has_the_loss_at_zero",
        ("reference = batch.reference_chosen, batch.reference_rejected", "reference = 0 * chosen, 0 * rejected"),
    ),
    defect(
        "no SFT term next to the loss",
        "preference_losses_are_cores",
        ("values - loss.sft_weight * chosen / update.tokens", "values"),
    ),
    defect(
        "the last prompt token counts",
        "preference_losses_are_cores",
        ("mask.flat[layout.sources + 1] = True", "mask.flat[layout.sources + 1] = mask.flat[layout.sources] = True"),
    ),
    defect(
        "pairs reported in another order",
        "pairs_one_by_one_are_pairs_together",
        ("np.concatenate(reported, axis=1)", "np.concatenate(reported[::-1], axis=1)"),
    ),
    defect(
        "log-probs of one pair too few",
        "preference_losses_are_cores",
        ("np.concatenate(reported, axis=1).astype", "np.concatenate(reported, axis=1)[:, 1:].astype"),
    ),
    defect(
        "no log-probs of pairs",
        "preference_losses_are_cores",
        ("StepMetrics(total, norm, chosen_log_probs=sums[0], rejected_log_probs=sums[1])", "StepMetrics(total, norm)"),
    ),
    # State.
    defect(
        "a site that save forgets",
        "the_values_given_are_those_saved",
        (
            "return TrainingState(_adapter(model), dict",
            (
                "kept = {site: pair for site, pair in _adapter(model).tensors.items() if site != UP}\n"
                "    return TrainingState(AdapterState(_adapter(model).config, kept), dict"
            ),
        ),
    ),
    defect(
        "moments of one order only",
        "moments_are_named_and_shaped_as_the_factors",
        ("dict(model.first), dict(model.second), model.steps)", "dict(model.first), {}, model.steps)"),
    ),
    defect(
        "moments under other names",
        "moments_are_named_and_shaped_as_the_factors",
        (
            "dict(model.first), dict(model.second), model.steps)",
            "{f'base.{s}': p for s, p in model.first.items()}, dict(model.second), model.steps)",
        ),
    ),
    defect(
        "a negative step count",
        "before_the_first_step_there_are_no_moments",
        ("dict(model.second), model.steps)", "dict(model.second), model.steps - 1)"),
    ),
    defect(
        "a restored adapter that is scaled",
        "restoring_takes_over_the_adapter_that_computes",
        (
            "    model.adapter = state.adapter\n",
            (
                "    halved = {site: LoraFactors(a, b / 2) for site, (a, b) in state.adapter.tensors.items()}\n"
                "    model.adapter = AdapterState(state.adapter.config, halved)\n"
            ),
        ),
    ),
    defect(
        "an empty state",
        "the_values_given_are_those_saved",
        ("return TrainingState(_adapter(model), dict(model.first), dict(model.second), model.steps)", "return None"),
    ),
    defect(
        "moments are not restored",
        "resume_is_bit_for_bit",
        ("dict(state.first_moments), dict(state.second_moments)", "{}, {}"),
    ),
    defect(
        "steps are counted by the process",
        "the_step_count_is_the_states",
        ("state.optimizer_steps if state.first_moments else 0", "model.steps if state.first_moments else 0"),
    ),
    defect(
        "a stage starts with the steps of the last",
        "a_state_without_moments_starts_the_optimizer_from_scratch",
        ("state.optimizer_steps if state.first_moments else 0", "state.optimizer_steps or model.steps"),
    ),
    defect(
        "the saved state is the live one",
        "a_saved_state_is_a_copy",
        ("    return moved.astype(np.float32), mean", "    value[...] = moved\n    return value, mean"),
    ),
    defect(
        "a state of any configuration",
        "a_state_of_another_configuration_is_refused",
        ("if _adapter(model).config != state.adapter.config:", "if not _adapter(model):"),
    ),
    defect(
        "the adapter is not restored",
        "restoring_takes_over_the_adapter_that_computes",
        ("    model.adapter = state.adapter\n", ""),
    ),
    # Generation.
    defect(
        "a token that the model does not have",
        "greedy_takes_the_likeliest_token",
        (
            "                tokens.append(token)\n",
            "                tokens.append(999999 if len(tokens) == len(prompt) + 5 else token)\n",
        ),
    ),
    defect(
        "an unknown stop reason",
        "a_stop_token_ends_an_answer_and_is_not_part_of_it",
        ('"stop" if stopped', '"eos" if stopped'),
    ),
    defect(
        "tokens as a list",
        "greedy_takes_the_likeliest_token",
        ("np.array(tokens[len(prompt) :], np.int32)", "tokens[len(prompt) :]"),
    ),
    defect(
        "more tokens than asked for",
        "greedy_takes_the_likeliest_token",
        ("< len(prompt) + sampling.max_new_tokens", "<= len(prompt) + sampling.max_new_tokens"),
    ),
    defect(
        "an answer is missing",
        "a_prompt_alone_and_among_others",
        ("in enumerate(prompts):", "in enumerate(prompts[1:]):"),
    ),
    defect(
        "the second likeliest token",
        "greedy_takes_the_likeliest_token",
        ("int(log_probs.argmax())", "int(log_probs.argsort()[-2])"),
    ),
    defect(
        "generation without the adapter",
        "the_adapter_changes_answers_and_off_restores_them",
        ("np.array([tokens], np.int32), adapter=adapter)", "np.array([tokens], np.int32), adapter=False)"),
    ),
    defect(
        "the stop token is part of the answer",
        "a_stop_token_ends_an_answer_and_is_not_part_of_it",
        (
            "            if not stopped:\n                tokens.append(token)\n",
            "            tokens.append(token)\n            if not stopped:\n",
        ),
    ),
    defect(
        "only the first stop token stops",
        "a_stop_token_ends_an_answer_and_is_not_part_of_it",
        ("in sampling.stop_token_ids\n", "in sampling.stop_token_ids[:1]\n"),
    ),
    defect(
        "answers in another order",
        "a_prompt_alone_and_among_others",
        ("in enumerate(prompts):", "in enumerate(sorted(prompts, key=len)):"),
    ),
    defect(
        "tokens are told when the answer is done",
        "tokens_are_told_while_an_answer_is_generated",
        ("stopped = on_token is not None and on_token(row, token) is False\n", "pass\n"),
        (
            "        answers.append(",
            "        [on_token(row, told) for told in tokens[len(prompt) :] if on_token]\n        answers.append(",
        ),
    ),
    defect("tokens are told under another row", "told_tokens_are_the_answers", ("on_token(row,", "on_token(0,")),
    defect(
        "the answer to a token is ignored",
        "a_token_that_is_answered_with_false_is_the_last_one",
        ("on_token(row, token) is False", "on_token(row, token) and False"),
    ),
    defect(
        "what is kept of a conversation is used for the other model",
        "the_next_turn_of_a_conversation",
        ("    answers = []\n", "    answers, kept = [], vars(model).setdefault('kept', [])\n"),
        (
            "        stopped = False\n",
            (
                "        stopped = False\n        begins = [*prompt] if on_token else []\n"
                "        begun = [own for text, own in kept if begins[: len(text)] == text]\n"
            ),
        ),
        (
            "np.array([tokens], np.int32), adapter=adapter)",
            "np.array([tokens], np.int32), adapter=(begun or [adapter])[0])",
        ),
        (
            "        answers.append(",
            "        kept += [(tokens, adapter)] if on_token else []\n        answers.append(",
        ),
    ),
    defect(
        "a row draws by the seed of the row before it",
        "each_prompt_has_its_settings",
        ('{"sampling", "streaming", *', '{"sampling", "streaming", "mixed", *'),
        (
            "        stopped = False\n",
            "        stopped = False\n        sampling = replace(sampling.of_each(row + 1)[row], rows=sampling.rows)\n",
        ),
        ("from dataclasses import ", "from dataclasses import replace, "),
        claims=("mixed",),
    ),
    defect(
        "draws without a seed",
        "sampling_follows_its_seed",
        ("default_rng([sampling.seed, *prompt.tolist()])", "default_rng()"),
    ),
    defect(
        "temperature multiplies",
        "sampling_when_there_is_no_choice_is_greedy",
        (" / sampling.temperature)", " * sampling.temperature)"),
    ),
    defect(
        "draws sharper than the model",
        "draws_follow_the_probabilities",
        (" / sampling.temperature)", " / sampling.temperature * 3)"),
    ),
)

MODULE = """
import pytest
from mindprint.contract import QUANTIZED_FORMATS
from mindprint_hello.model_folder import write_model
from mindprint_testing import BackendConformance

class Defective:
    capabilities = frozenset({{"sampling", "streaming", *QUANTIZED_FORMATS}})

    @pytest.fixture
    def model_folder(self, tmp_path_factory):
        folder = tmp_path_factory.getbasetemp() / "hello"
        return folder if folder.exists() else write_model(folder, hidden=32)

for number, claims in enumerate({claims}):
    bases = (Defective, BackendConformance)
    attributes = {{"backend_name": f"defect-{{number}}", "capabilities": Defective.capabilities | set(claims)}}
    globals()[f"Test{{number}}"] = type(f"Test{{number}}", bases, attributes)
"""


def failures(defects: Sequence[Defect], *, everything: bool = False) -> list[set[str]]:
    """Return the names of the tests that fail on each defect: of all tests, or only of the one that should."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        module = _install(folder, defects)
        chosen = [f"{module}::Test{number}::{defect.caught_by}" for number, defect in enumerate(defects)]
        report = folder / "report.xml"
        options = ["-q", "--tb=no", "-p", "no:cacheprovider", f"--rootdir={folder}", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *([str(module)] if everything else chosen)]
        # Behind them stays the caller's own path: the suite that is tested may lie there, and not in the environment.
        path = os.pathsep.join([str(folder / "site"), str(EXAMPLE.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest did not run the defects:\n{done.stdout}\n{done.stderr}")
        return _failed(report, len(defects))


def _install(folder: Path, defects: Sequence[Defect]) -> Path:
    """Install a backend of each defect, all in one distribution, into a folder. Return the test module."""
    source = (EXAMPLE / "plugin.py").read_text(encoding="utf-8")
    site = folder / "site"
    metadata = site / "defects-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: defects\nVersion: 1\n", encoding="utf-8")
    points = [f"defect-{number} = defect_{number}" for number in range(len(defects))]
    (metadata / "entry_points.txt").write_text("\n".join(["[mindprint.backends]", *points]), encoding="utf-8")
    for number, defect in enumerate(defects):
        (site / f"defect_{number}.py").write_text(defect.applied(source), encoding="utf-8")
    module = folder / "test_defects_seeded.py"
    module.write_text(MODULE.format(claims=[defect.claims for defect in defects]), encoding="utf-8")
    return module


def _failed(report: Path, count: int) -> list[set[str]]:
    failed: list[set[str]] = [set() for _ in range(count)]
    for case in ET.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            number = int(case.attrib["classname"].rpartition("Test")[2])
            failed[number].add(case.attrib["name"].partition("[")[0])
    return failed


def caught(defects: Sequence[Defect], failed: Sequence[set[str]]) -> Mapping[str, bool]:
    """Return, for each defect, whether the test that should catch it did."""
    return {defect.name: defect.caught_by in names for defect, names in zip(defects, failed, strict=True)}


def main(everything: bool) -> int:
    failed = failures(DEFECTS, everything=everything)
    results = caught(DEFECTS, failed)
    for defect, names in zip(DEFECTS, failed, strict=True):
        by = ", ".join(sorted(names)) if everything else defect.caught_by
        print(f"{'caught' if results[defect.name] else 'MISSED':7s} {defect.name}: {by}")
    print(f"caught {sum(results.values())} of {len(DEFECTS)}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main("--all" in sys.argv[1:]))
