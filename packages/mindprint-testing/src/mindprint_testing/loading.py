"""Bases: loaded as they are, digested, released, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindprint.adapter.gguf_merging import write_base
from mindprint.contract import ModelSpec
from mindprint.errors import ModelError
from mindprint.models.folder import SINGLE_FILE, tensors
from mindprint.models.token_ids import embedding_rows
from mindprint_testing.bench import Bench
from mindprint_testing.claims import Claims
from mindprint_testing.injection import EXACT

SIZES = {"F32": 4, "BF16": 2, "F16": 2}


class Loading(Claims):
    """`mindprint_load_model`, `mindprint_adapter_sites`, `mindprint_base_digest`, `mindprint_release`."""

    def test_facts_of_a_load(self, bench: Bench) -> None:
        """Device, dtype, parameters and vocabulary are those of the folder.

        If it fails: the run's manifest records another model than the one that was trained, or token ids are compared
        with another number than the embedding table has rows. Look at the `LoadedModel` that `mindprint_load_model`
        returns.
        """
        model = bench.load()
        config = json.loads((bench.folder / "config.json").read_text(encoding="utf-8"))
        stored = sum(int(np.prod(info.shape)) for info in tensors(bench.folder).values())
        assert (model.device, model.dtype) == (bench.device, "float32")
        # The table may be padded beyond the configured vocabulary.
        assert model.vocab_size >= config["vocab_size"]
        assert model.vocab_size == embedding_rows(bench.folder)
        assert model.parameters == stored

    def test_sites_are_the_folders_modules(self, bench: Bench) -> None:
        """Every linear site `NAME` is the tensor `NAME.weight` of the folder, `[out, in]`; an embedding `[in, out]`.

        If it fails: adapters are written under names, or in shapes, that PEFT does not find. Look at
        `mindprint_adapter_sites`: names are transformers' module paths.
        """
        stored = tensors(bench.folder)
        sites = bench.backend.adapter_sites(bench.load())
        names = [site.name for site in sites]
        assert len(set(names)) == len(names), "a site is listed twice"
        assert bench.linear_sites(bench.load()), "no linear site: nothing could be trained"
        for site in sites:
            shape = (site.out_features, site.in_features)
            if site.kind == "linear":
                assert stored[f"{site.name}.weight"].shape == shape, site
            elif site.kind == "embedding":
                assert stored[f"{site.name}.weight"].shape == shape[::-1], site

    def test_sites_are_the_same_with_an_adapter(self, bench: Bench) -> None:
        """Injecting an adapter neither adds sites nor renames them.

        If it fails: the adapter's own layers are listed, or wrapping changed the module paths. Take the list before
        injecting and keep it.
        """
        model = bench.load()
        before = bench.backend.adapter_sites(model)
        bench.backend.inject_adapter(model, bench.adapter(bench.linear_sites(model)))
        assert bench.backend.adapter_sites(model) == before

    def test_the_digest_is_of_the_base_alone(self, bench: Bench) -> None:
        """The same base has the same digest in another load, with an adapter, and after training.

        If it fails: the guard against a changed base stops sound runs; or training really does change the base. Look at
        which tensors `mindprint_base_digest` reads.
        """
        model = bench.ready()
        before = bench.backend.base_digest(bench.load())
        assert bench.backend.base_digest(model) == before
        if self.training:
            bench.sft_step(model, bench.token_batch())
            bench.dpo_step(model, bench.preference_batch())
        assert bench.backend.base_digest(model) == before

    @pytest.mark.parametrize("place", ["first", "middle", "last"])
    def test_the_digest_sees_one_changed_element(self, bench: Bench, tmp_path: Path, place: str) -> None:
        """One element of one tensor, changed by one bit in the middle of its mantissa, gives another digest.

        If it fails: a base that changes during training goes unseen. Look at how `mindprint_base_digest` reads
        weights: all of them, exactly, no sums that rounding swallows.
        """
        folder = Path(shutil.copytree(bench.folder, tmp_path / "changed"))
        infos = sorted(tensors(folder).values(), key=lambda info: info.start)
        info = {"first": infos[0], "middle": infos[len(infos) // 2], "last": infos[-1]}[place]
        contents = bytearray(info.file.read_bytes())
        # The second byte of the last element: in the middle of a float32's mantissa, 2^-15 of its value.
        contents[info.end - SIZES[info.dtype] + 1] ^= 1
        info.file.write_bytes(contents)
        assert bench.backend.base_digest(bench.load(folder=folder)) != bench.backend.base_digest(bench.load())

    def test_the_largest_weight_is_that_of_the_folder(self, bench: Bench, tmp_path: Path) -> None:
        """`mindprint_largest_weight`, an optional hook: the folder's largest magnitude, NaN if the embedding has one.

        If it fails: a damaged base is found only after training, when no fingerprint can be taken. Look at which
        tensors `mindprint_largest_weight` reads, and whether its maximum passes NaN on.
        """
        largest = bench.backend.largest_weight(bench.load())
        if largest is None:
            return
        stored = {file: load_file(file) for file in {info.file for info in tensors(bench.folder).values()}}
        assert largest == max(float(np.abs(values).max()) for part in stored.values() for values in part.values())
        folder = Path(shutil.copytree(bench.folder, tmp_path / "damaged"))
        info = next(info for name, info in tensors(folder).items() if "embed" in name)
        contents = bytearray(info.file.read_bytes())
        # The last token's last value, all bits set: NaN. Loading may compute with the first tokens.
        contents[info.end - SIZES[info.dtype] : info.end] = b"\xff" * SIZES[info.dtype]
        info.file.write_bytes(contents)
        found = bench.backend.largest_weight(bench.load(folder=folder))
        assert found is not None
        assert np.isnan(found)

    def test_an_unknown_architecture_is_refused(self, bench: Bench, tmp_path: Path) -> None:
        """A `model_type` that the backend does not compute is a `ModelError`.

        If it fails: users get a traceback of the framework, or another model than they named. Look at the first lines
        of `mindprint_load_model`.
        """
        folder = Path(shutil.copytree(bench.folder, tmp_path / "unknown"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config |= {"model_type": "no_such_architecture", "architectures": ["NoSuchForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(ModelError):
            bench.load(folder=folder)

    def test_missing_weights_are_refused(self, bench: Bench, tmp_path: Path) -> None:
        """A folder that lacks one tensor is a `ModelError`.

        If it fails: the framework fills missing weights with random numbers and trains on them. Look at its report of
        missing names at load.
        """
        folder = Path(shutil.copytree(bench.folder, tmp_path / "missing"))
        weights = load_file(folder / SINGLE_FILE)
        # A weight that could take LoRA: frameworks fill it with random numbers most readily.
        name = f"{bench.linear_sites(bench.load())[0].name}.weight"
        del weights[name]
        save_file(weights, folder / SINGLE_FILE, metadata={"format": "pt"})
        with pytest.raises(ModelError):
            bench.load(folder=folder)

    def test_a_gguf_file_is_the_folder_it_was_written_from(self, bench: Bench, tmp_path: Path) -> None:
        """The log-probs of a GGUF file in float32 are those of the folder that core wrote it from.

        If it fails: the file is read in another layout, or a key such as the rope base is ignored.
        """
        self.needs("gguf")
        file, batch = tmp_path / "base.gguf", bench.token_batch()
        write_base(file, bench.folder)
        # Not by `Bench.load`, which asks a folder for its quantization.
        model = bench.backend.load_model(ModelSpec(str(file), bench.device, "float32"))
        found, expected = (bench.backend.log_probs(each, batch) for each in (model, bench.load()))
        np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT)
        assert bench.backend.adapter_sites(model) == ()

    def test_releasing_one_model_leaves_the_others(self, bench: Bench) -> None:
        """A released model is gone, another one in the same process works on.

        If it fails: models share state in the backend's module. Look for globals that `mindprint_release` clears.
        """
        released, kept, batch = bench.ready(), bench.ready(seed=1), bench.token_batch()
        before = bench.backend.log_probs(kept, batch)
        # The hook itself, because `Backend.release` drops its answer.
        assert bench.backend._hook.mindprint_release(model=released.handle) is True
        np.testing.assert_array_equal(bench.backend.log_probs(kept, batch), before)
        if self.training:
            assert bench.sft_step(kept, batch).grad_norm > 0
