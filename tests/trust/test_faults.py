"""Every fault of the catalogue is found, and under its right name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import outcomes
import pytest
from artefacts import Artefact, convert_to_mlx_lm, edit_json, make_adapter, make_base, merge_with_peft, placement
from catalogue import FAULTS, THOROUGH, Fault
from catalogue.edits import edit_tokenizer

from mindprint.adapter.peft_format import read_adapter
from mindprint.errors import MindprintError
from mindprint.models.folder import ModelFolder, check_model_folder
from mindprint.trust.fingerprint import read_fingerprint
from mindprint.trust.report import Report
from mindprint.trust.verify import verify_adapter, verify_merged


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    artefact = Artefact(tmp_path_factory.mktemp("sound"))
    make_base(artefact.base, "qwen2", tie_word_embeddings=False, rms_norm_eps=1e-2)
    # A template that writes a special token by its name, as most do.
    template = artefact.base / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text())
    edit_json(artefact.base / "tokenizer_config.json", {"bos_token": "<|im_start|>"})
    edit_tokenizer(artefact.base, add_special_token)
    make_adapter(artefact)
    merge_with_peft(artefact)
    return artefact


def add_special_token(tokenizer: dict[str, Any]) -> None:
    """Make the last word of the vocabulary special, as a model's own markers are.

    Those that tokenizer_config.json names are special whatever tokenizer.json says: transformers makes them so.
    """
    text, number = max(tokenizer["model"]["vocab"].items(), key=lambda entry: entry[1])
    first = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"].append({**first, "id": number, "content": text, "special": True})


def verified(fault: Fault, artefact: Artefact) -> Report:
    """What `mindprint verify` does, on the artefact that the fault has broken."""
    where = placement("torch")
    if fault.kind == "conversion":
        convert_to_mlx_lm(artefact)
    if fault.kind == "backend":
        where = type(where)(fault.apply(where.backend), where.device, where.dtype)
    else:
        fault.apply(artefact)
    base = ModelFolder(check_model_folder(artefact.base), "base")
    if fault.kind != "merge":
        return verify_adapter(artefact.adapter, base, where)
    merged = ModelFolder(check_model_folder(artefact.merged), "merged")
    adapter, _ = read_adapter(artefact.adapter)
    return verify_merged(merged, base, adapter, where, read_fingerprint(artefact.adapter))


TRIED = [fault for fault in FAULTS if os.environ.get("MINDPRINT_TRUST") == "all" or fault.name not in THOROUGH]
"""`nox -s trust` tries all, plain nox the quick ones and one of each kind."""


@pytest.mark.parametrize("fault", TRIED, ids=lambda fault: f"{fault.kind}: {fault.name}")
def test_a_fault_is_found_by_its_name(fault: Fault, sound: Artefact, tmp_path: Path) -> None:
    found = False
    try:
        if fault.finds is None:
            with pytest.raises(MindprintError, match=re.escape(fault.refusal)) as refused:
                verified(fault, sound.copy(tmp_path))
            assert refused.value.exit_code == 2
            assert "\n" not in str(refused.value)
        else:
            report = verified(fault, sound.copy(tmp_path))
            assert not report.ok
            assert fault.finds in report.codes, report.findings
            if fault.factor is not None:
                (finding,) = [one for one in report.findings if one.code == "scale"]
                assert finding.factor == pytest.approx(fault.factor, rel=1e-3)
        found = True
    finally:
        outcomes.fault(fault.kind, found=found)


def test_the_catalogue_is_large_and_says_where_each_was_seen() -> None:
    assert len(FAULTS) >= 130
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert {fault.name for fault in FAULTS} >= THOROUGH
    assert all(len(fault.source) > 10 and bool(fault.finds) != bool(fault.refusal) for fault in FAULTS)
