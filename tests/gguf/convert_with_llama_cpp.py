"""Run llama.cpp's own converters on many folders in one process: `python convert_with_llama_cpp.py SOURCE JOBS.json`.

SOURCE is a checkout of llama.cpp. JOBS is a list of {"base", "adapter", "base_gguf", "adapter_gguf", "settings"}. The
random models have no vocabulary that llama.cpp could read, so a file says `no_vocab`, unless a job has "pre", the name
of its way of splitting text. The converters know that name only by the tokens that published tokenizers give a text.
`settings` are added to those of config.json. Nothing else of the converters is replaced. For each job a line of JSON is
printed: an object with the errors of `base` and `adapter`, empty if both were written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import runpy
import sys
from pathlib import Path
from typing import Any


def main(source: Path, jobs: list[dict[str, Any]]) -> None:
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    logging.disable(logging.CRITICAL)
    settings: dict[str, Any] = {}
    adapt_classes(settings)
    for job in jobs:
        settings.clear()
        settings.update(job["settings"])
        settings["pre"] = job.get("pre")
        base = [job["base"], "--outfile", job["base_gguf"], "--outtype", "f32"]
        errors = {"base": error_of(source / "convert_hf_to_gguf.py", base)}
        if job["adapter"]:
            adapter = [job["adapter"], "--base", job["base"], "--outfile", job["adapter_gguf"], "--outtype", "f32"]
            errors["adapter"] = error_of(source / "convert_lora_to_gguf.py", adapter)
        print(json.dumps({name: error for name, error in errors.items() if error}), flush=True)


def error_of(script: Path, words: list[str]) -> str | None:
    """Run a converter as its command would. Return its error, None if it has none."""
    sys.argv = [str(script), *words]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as error:
        return f"exit {error.code}" if error.code else None
    except Exception as error:  # noqa: BLE001 (whatever the converter raises is the result)
        return f"{type(error).__name__}: {error}"
    return None


def adapt_classes(settings: dict[str, Any]) -> None:
    """Let every model class of the converters know the settings, and write the number of tokens for a vocabulary."""
    import conversion  # type: ignore[import-not-found]

    find_class = conversion.get_model_class

    def set_vocab(model: Any) -> None:
        model.gguf_writer.add_tokenizer_model("no_vocab")
        # Some classes write the number of tokens in any case, and a key may be written once.
        if not any(f"{model.gguf_writer.arch}.vocab_size" in section for section in model.gguf_writer.kv_data):
            model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])

    def adapted(*words: Any, **options: Any) -> Any:
        model_class = find_class(*words, **options)

        set_parameters = model_class.set_gguf_parameters

        def set_gguf_parameters(model: Any) -> None:
            model.hparams = model.hparams | {name: value for name, value in settings.items() if name != "pre"}
            set_parameters(model)

        # A new class for each job, because the families of a module share the converter's classes.
        parts = {"set_gguf_parameters": set_gguf_parameters, "model_arch": model_class.model_arch}
        pre = settings["pre"]
        parts |= {"set_vocab": set_vocab} if pre is None else {"get_vocab_base_pre": lambda *_: pre}
        return type(model_class.__name__, (model_class,), parts)

    conversion.get_model_class = adapted


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
