"""Tokens, masks and truncation equal TRL's: its real trainers prepare the same rows, and every id is compared.

The chat templates are those of published models, as TRL ships them; the tokenizers are of the classes that
`AutoTokenizer` picks for Qwen2 and Llama, saved as such models are. Where we differ on purpose, the test says why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindprint.config import ConfigFile, make_config
from mindprint.data.collate import pair_sequences, sft_batch
from mindprint.data.render import PreferenceExample, Rendered, SftExample, render_preferences, render_sft
from mindprint.data.rows import Origin, preference_row, read_rows
from mindprint.data.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL itself

TEXTS = ["What time is tea?", "At four, and not a minute later.", "Is it raining?", "It is, and it will.", "No thanks."]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
SPECIAL += ["<end_of_turn>", "<think>", "</think>", "<|user|>", "<|assistant|>", "<|end|>"]


def template(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Peers:
    """TRL's trainers and our tokenizer over one tokenizer folder and template."""

    ours: Tokenizer
    theirs: Any
    sft: Any
    dpo: Any

    def trl_sft(self, records: list[dict[str, Any]], max_length: int = 1024) -> list[dict[str, Any]]:
        from datasets import Dataset

        self.sft.args.max_length = max_length
        self.sft.completion_only_loss = "completion" in records[0]
        dataset = Dataset.from_list(records)
        return list(self.sft._prepare_dataset(dataset, self.theirs, self.sft.args, False, None, "train"))

    def trl_dpo(self, records: list[dict[str, Any]], max_length: int = 1024) -> list[dict[str, Any]]:
        from datasets import Dataset

        self.dpo.args.max_length = max_length
        return list(self.dpo._prepare_dataset(Dataset.from_list(records), self.theirs, self.dpo.args, "train"))


MakePeers = Callable[[str, str | None], Peers]


def save_qwen2(folder: Path) -> None:
    """Byte-level BPE as Qwen2's, merges learnt from a few sentences."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    alphabet = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    blank = Qwen2Tokenizer(vocab={**alphabet, "<|endoftext|>": len(alphabet)}, merges=[])
    trained = blank.train_new_from_iterator(TEXTS, 300)
    trained.add_special_tokens({"eos_token": "<|endoftext|>", "bos_token": "<|im_start|>"})
    trained.add_tokens(SPECIAL, special_tokens=True)
    trained.save_pretrained(folder)


def save_llama(folder: Path) -> None:
    """SentencePiece-like BPE as Llama's: spaces are `▁`, unknown characters bytes, a BOS before every text."""
    from transformers import LlamaTokenizer

    letters = sorted({letter for text in TEXTS for letter in text.replace(" ", "▁")})
    merges = [("▁", "t"), ("▁", "i"), ("i", "t"), ("▁", "a"), ("n", "o"), ("▁i", "t"), ("a", "t")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *map("".join, merges)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.save_pretrained(folder)


SAVE = {"qwen2": save_qwen2, "llama": save_llama}


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakePeers]:
    """`trainers(kind, template name)`; a real `SFTTrainer` and `DPOTrainer` a kind, made once."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    made: dict[str, tuple[Path, Any, Any]] = {}

    def make(kind: str, name: str | None) -> Peers:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            SAVE[kind](folder)
            made[kind] = (folder, *_trainers(folder))
        folder, sft, dpo = made[kind]
        path = folder / "chat_template.jinja"
        path.write_text(template(name), encoding="utf-8") if name else path.unlink(missing_ok=True)
        return Peers(load_tokenizer(folder), AutoTokenizer.from_pretrained(folder), sft, dpo)

    yield make
    datasets.enable_progress_bars()


def _trainers(folder: Path) -> tuple[Any, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    common = {"output_dir": str(folder / "out"), "report_to": "none", "use_cpu": True, "bf16": False}
    sft_rows = Dataset.from_list([{"prompt": "Is it", "completion": " raining?"}])
    dpo_rows = Dataset.from_list([{"prompt": "Is it", "chosen": " raining?", "rejected": " tea?"}])
    sft = SFTTrainer(model, SFTConfig(**common), train_dataset=sft_rows, processing_class=tokenizer)
    dpo = DPOTrainer(model, args=DPOConfig(**common), train_dataset=dpo_rows, processing_class=tokenizer)
    return sft, dpo


def read(
    folder: Path, records: list[dict[str, Any]], part: str, data_format: str, max_length: int = 1024
) -> ConfigFile:
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    stage = {"sft": {"enabled": part == "sft"}, "dpo": {"enabled": part == "preferences"}}
    data = {"path": None, part: "rows.jsonl", "format": data_format, "max_length": max_length}
    return make_config({"data": data, **stage}, folder)


def our_sft(folder: Path, peers: Peers, records: list[dict[str, Any]], **data: Any) -> Rendered[SftExample]:
    file = read(folder, records, "sft", data.pop("data_format", "chat"), **data)
    return render_sft(read_rows(file).sft, peers.ours, file.config.data)


def our_pairs(folder: Path, peers: Peers, records: list[dict[str, Any]], **data: Any) -> Rendered[PreferenceExample]:
    file = read(folder, records, "preferences", data.pop("data_format", "chat"), **data)
    return render_preferences(read_rows(file).preferences, peers.ours, file.config.data)


def assert_same_sft(ours: Rendered[SftExample], theirs: list[dict[str, Any]]) -> None:
    """Ids equal; masks too, but for the first token of a sequence, which TRL labels and its shift then drops."""
    assert [example.tokens.tolist() for example in ours.examples] == [row["input_ids"] for row in theirs]
    for example, row in zip(ours.examples, theirs, strict=True):
        assert example.loss_mask[1:].tolist() == [label != -100 for label in row["labels"]][1:]
        assert not example.loss_mask[0]


def assert_same_pairs(ours: Rendered[PreferenceExample], theirs: list[dict[str, Any]], max_length: int = 1024) -> None:
    """Ids of all three parts, the completions as far as TRL's collator keeps them."""
    assert [example.prompt.tolist() for example in ours.examples] == [row["prompt_ids"] for row in theirs]
    for example, row in zip(ours.examples, theirs, strict=True):
        room = max_length - len(row["prompt_ids"])
        assert example.chosen.tolist() == row["chosen_ids"][:room]
        assert example.rejected.tolist() == row["rejected_ids"][:room]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def talk(*texts: str) -> list[dict[str, str]]:
    return [assistant(text) if index % 2 else user(text) for index, text in enumerate(texts)]


CONVERSATIONS = [talk(*TEXTS[:2]), talk(*TEXTS[2:4]), talk(*TEXTS[:4]), talk("Grüße, 木?", "Danke 🙂", *TEXTS[:2])]
TEMPLATES = [
    "qwen2_5",
    "qwen3",
    "qwen3_instruct_2507",
    "qwen3_5_think",
    "llama3",
    "gemma",
    "phi3",
    "deepseek_r1_distill",
]
DIVERGING = ["deepseek_r1_distill"]

both_tokenizers = pytest.mark.parametrize("kind", sorted(SAVE))
every_template = pytest.mark.parametrize("name", TEMPLATES)


# --- conversational rows ---------------------------------------------------------------------------------------------


@both_tokenizers
@every_template
def test_sft_conversations(trainers: MakePeers, tmp_path: Path, kind: str, name: str) -> None:
    """Prompts of one and of several turns. One template's generation prompt opens a thought that the rendered answer
    does not have: there the common prefix decides."""
    peers = trainers(kind, name)
    records = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CONVERSATIONS]
    ours = our_sft(tmp_path, peers, records)
    assert_same_sft(ours, peers.trl_sft(records))
    # None of them writes an end-of-sequence after an answer as its own template for this tokenizer would.
    diverging = [words for words in ours.warnings if "generation prompt is not a prefix" in words]
    assert len(diverging) == (name in DIVERGING)


@both_tokenizers
@every_template
def test_pairs_of_conversations(trainers: MakePeers, tmp_path: Path, kind: str, name: str) -> None:
    peers = trainers(kind, name)
    records = [
        {"prompt": chat[:-1], "chosen": chat[-1:], "rejected": [assistant(text)]}
        for chat, text in zip(CONVERSATIONS, ["Tea.", "It does not.", TEXTS[0], TEXTS[4]], strict=True)
    ]
    assert_same_pairs(our_pairs(tmp_path, peers, records), peers.trl_dpo(records))


@both_tokenizers
def test_pairs_with_an_implicit_prompt(trainers: MakePeers, tmp_path: Path, kind: str) -> None:
    peers = trainers(kind, "qwen2_5")
    records = [{"chosen": chat, "rejected": [*chat[:-1], assistant("Tea.")]} for chat in CONVERSATIONS]
    records.append({"chosen": talk(*TEXTS[:4]), "rejected": talk(TEXTS[0], "Tea.", *TEXTS[2:4])})
    assert_same_pairs(our_pairs(tmp_path, peers, records), peers.trl_dpo(records))
    # On purpose: TRL trains a pair of equals, whose gradient is zero. Ours is left out.
    equals = {"chosen": CONVERSATIONS[0], "rejected": CONVERSATIONS[0]}
    assert_same_pairs(our_pairs(tmp_path, peers, [*records, equals]), peers.trl_dpo(records))


TOOLS = [{"type": "function", "function": {"name": "tide", "description": "When?", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    "own",
    [{"tools": TOOLS}, {"tools": json.dumps(TOOLS)}, {"chat_template_kwargs": {"enable_thinking": False}},
     {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": True}}],
)  # fmt: skip
def test_tools_and_template_variables_of_a_row(trainers: MakePeers, tmp_path: Path, own: dict[str, Any]) -> None:
    peers = trainers("qwen2", "qwen3")
    chat = CONVERSATIONS[0]
    sft = [{"prompt": chat[:-1], "completion": chat[-1:], **own}]
    assert_same_sft(our_sft(tmp_path, peers, sft), peers.trl_sft(sft))
    pairs = [{"prompt": chat[:-1], "chosen": chat[-1:], "rejected": [assistant("Tea.")], **own}]
    assert_same_pairs(our_pairs(tmp_path, peers, pairs), peers.trl_dpo(pairs))


@both_tokenizers
def test_string_rows_are_a_user_and_an_assistant(trainers: MakePeers, tmp_path: Path, kind: str) -> None:
    """On purpose: TRL trains strings as plain text. Ours are short for messages unless `data.format` is raw."""
    peers = trainers(kind, "qwen2_5")
    strings = [{"prompt": TEXTS[0], "completion": TEXTS[1]}]
    messages = [{"prompt": [user(TEXTS[0])], "completion": [assistant(TEXTS[1])]}]
    assert_same_sft(our_sft(tmp_path, peers, strings), peers.trl_sft(messages))


@both_tokenizers
@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma"])
def test_messages_train_each_answer_as_trl_trains_a_completion(
    trainers: MakePeers, tmp_path: Path, kind: str, name: str
) -> None:
    """On purpose: of `messages` TRL trains every token, the user's and the template's too, or, with
    `assistant_only_loss`, what `{% generation %}` encloses, a mark that few published templates have. Ours are TRL's
    tokens under the union of TRL's completion masks, turn by turn."""
    peers = trainers(kind, name)
    chat = CONVERSATIONS[2]
    (ours,) = our_sft(tmp_path, peers, [{"messages": chat}]).examples
    (whole,) = peers.trl_sft([{"messages": chat}])
    turns = peers.trl_sft([{"prompt": chat[:end], "completion": chat[end : end + 1]} for end in (1, 3)])
    trained = np.zeros(len(whole["input_ids"]), dtype=bool)
    for turn in turns:
        trained[: len(turn["labels"])] |= np.array(turn["labels"]) != -100
    assert ours.tokens.tolist() == whole["input_ids"]
    assert ours.loss_mask.tolist() == trained.tolist()


def test_history_that_the_template_rewrites_is_not_trained_on(trainers: MakePeers, tmp_path: Path) -> None:
    """On purpose: Qwen3 shows earlier answers without their thoughts, so an answer in the history is not what the
    model would have written. Each turn becomes the example that TRL makes of it as prompt and completion."""
    peers = trainers("qwen2", "qwen3")
    chat = CONVERSATIONS[2]
    ours = our_sft(tmp_path, peers, [{"messages": chat}])
    turns = [{"prompt": chat[:end], "completion": chat[end : end + 1]} for end in (1, 3)]
    assert_same_sft(ours, peers.trl_sft(turns))
    assert ours.notes == ("the chat template rewrites earlier turns: 1 conversations became one example per turn",)


def test_a_dated_template_is_held_at_one_day(trainers: MakePeers, tmp_path: Path) -> None:
    """On purpose: Llama 3.2's template writes today's date, so TRL's tokens of the same rows differ from day to day
    and no run could be resumed tomorrow. Ours stay at the day that the template itself names without a clock."""
    peers = trainers("llama", "llama3_2")
    held = template("llama3_2").replace('strftime_now("%d %b %Y")', '"26 Jul 2024"')
    assert held != template("llama3_2")
    peers.theirs.chat_template = held
    records = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CONVERSATIONS]
    assert_same_sft(our_sft(tmp_path, peers, records), peers.trl_sft(records))


# --- plain rows ------------------------------------------------------------------------------------------------------

PLAIN = [
    {"prompt": "What time", "completion": " is tea?"},
    {"prompt": "What time ", "completion": "is tea?"},
    {"prompt": "Is it rai", "completion": "ning? It is."},
    {"prompt": "Grüße", "completion": " 🙂"},
]


@both_tokenizers
def test_raw_sft(trainers: MakePeers, tmp_path: Path, kind: str) -> None:
    """Boundaries on a space, before one, and within a word, where tokens merge across."""
    peers = trainers(kind, None)
    records = [*PLAIN, {"prompt": "No", "completion": " thanks." + peers.ours.eos_token}]
    assert_same_sft(our_sft(tmp_path, peers, records, data_format="raw"), peers.trl_sft(records))


@both_tokenizers
def test_raw_text(trainers: MakePeers, tmp_path: Path, kind: str) -> None:
    peers = trainers(kind, None)
    records = [{"text": text} for text in [*TEXTS, "No." + peers.ours.eos_token]]
    assert_same_sft(our_sft(tmp_path, peers, records, data_format="raw"), peers.trl_sft(records))


@both_tokenizers
def test_raw_pairs(trainers: MakePeers, tmp_path: Path, kind: str) -> None:
    peers = trainers(kind, None)
    records = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " tea?"} for row in PLAIN]
    assert_same_pairs(our_pairs(tmp_path, peers, records, data_format="raw"), peers.trl_dpo(records))


@both_tokenizers
def test_raw_pairs_with_an_implicit_prompt(trainers: MakePeers, tmp_path: Path, kind: str) -> None:
    peers = trainers(kind, None)
    sides = [("It is raining.", "It is tea."), ("It is raining.", "It is rather late."), ("No tea", "No tea, thanks.")]
    records = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in sides]
    assert_same_pairs(our_pairs(tmp_path, peers, records, data_format="raw"), peers.trl_dpo(records))


@pytest.mark.parametrize(
    "sides",
    [("The sky is blue.", "The sky is grey."), ("The sky is blue", "The sky is black"), ("ab", "ab"), ("ab", "abc")],
)
def test_implicit_prompts_are_trls(sides: tuple[str, str]) -> None:
    from trl import extract_prompt

    record = {"chosen": sides[0], "rejected": sides[1]}
    row = preference_row(record, Origin("rows.jsonl", 1), "raw")
    assert {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} == extract_prompt(record)


def test_a_written_bos_is_not_doubled(trainers: MakePeers, tmp_path: Path) -> None:
    """On purpose: TRL gives text that begins with `<s>` a second one. Nobody means two."""
    peers = trainers("llama", None)
    (ours,) = our_sft(tmp_path, peers, [{"text": "<s>No"}], data_format="raw").examples
    (theirs,) = peers.trl_sft([{"text": "<s>No"}])
    assert theirs["input_ids"][:2] == [peers.ours.bos_id] * 2
    assert ours.tokens.tolist() == theirs["input_ids"][1:]


# --- truncation ------------------------------------------------------------------------------------------------------


@both_tokenizers
@pytest.mark.parametrize("room", [-30, -1, 0, 1, 5, 100])
def test_truncation_of_sft(trainers: MakePeers, tmp_path: Path, kind: str, room: int) -> None:
    """Around the length of the longest prompt: cut, and left out where nothing trained remains."""
    peers = trainers(kind, "qwen2_5")
    records = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CONVERSATIONS]
    longest = max(row["labels"].count(-100) for row in peers.trl_sft(records))
    theirs = peers.trl_sft(records, longest + room)
    ours = our_sft(tmp_path, peers, records, max_length=longest + room)
    assert_same_sft(ours, theirs)
    assert ours.left_out == len(records) - len(theirs)


@both_tokenizers
@pytest.mark.parametrize("room", [-30, -1, 0, 1, 5, 100])
def test_truncation_of_pairs_and_their_batch(trainers: MakePeers, tmp_path: Path, kind: str, room: int) -> None:
    """The rows, and then the batch: TRL's collator truncates, ours gets what is truncated already."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    peers = trainers(kind, "qwen2_5")
    records = [{"prompt": chat[:-1], "chosen": chat[-1:], "rejected": [assistant("Tea.")]} for chat in CONVERSATIONS]
    longest = max(len(row["prompt_ids"]) for row in peers.trl_dpo(records))
    theirs = peers.trl_dpo(records, longest + room)
    ours = our_pairs(tmp_path, peers, records, max_length=longest + room)
    assert_same_pairs(ours, theirs, longest + room)
    assert ours.left_out == len(records) - len(theirs)
    batch = DataCollatorForPreference(pad_token_id=peers.ours.pad_id, max_length=longest + room)(theirs)
    for half, sequences in zip((0, 1), pair_sequences(ours.examples, peers.ours.pad_id), strict=True):
        rows = slice(half * len(theirs), (half + 1) * len(theirs))
        width = sequences.tokens.shape[1]
        assert sequences.tokens.tolist() == batch["input_ids"][rows, :width].tolist()
        assert sequences.loss_mask.astype(int).tolist() == batch["completion_mask"][rows, :width].tolist()
        assert sequences.lengths.tolist() == batch["attention_mask"][rows].sum(1).tolist()


@both_tokenizers
def test_an_sft_batch_is_trls(trainers: MakePeers, tmp_path: Path, kind: str) -> None:
    peers = trainers(kind, "qwen2_5")
    records = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CONVERSATIONS]
    batch = peers.sft.data_collator(peers.trl_sft(records))
    ours = sft_batch(our_sft(tmp_path, peers, records).examples, peers.ours.pad_id)
    assert ours.tokens.tolist() == batch["input_ids"].tolist()
    assert ours.loss_mask.tolist() == (batch["labels"] != -100).tolist()
    assert ours.lengths.tolist() == batch["attention_mask"].sum(1).tolist()


# --- the tokenizer itself --------------------------------------------------------------------------------------------


@both_tokenizers
def test_text_is_what_auto_tokenizer_makes_of_it(trainers: MakePeers, kind: str) -> None:
    peers = trainers(kind, None)
    for text in [*TEXTS, "  two  spaces\n\nand a line ", "naïve Å 木 🙂", "<|im_end|>x", "", " ", "1234567"]:
        assert peers.ours.encode(text) == peers.theirs(text)["input_ids"], text
        assert peers.ours.decode(peers.ours.encode(text)) == peers.theirs.decode(
            peers.theirs(text)["input_ids"], skip_special_tokens=True
        )
    assert (peers.ours.eos_id, peers.ours.bos_id) == (peers.theirs.eos_token_id, peers.theirs.bos_token_id)
