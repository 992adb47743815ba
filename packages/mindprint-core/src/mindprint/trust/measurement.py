"""Taking a fingerprint: exact facts from the files, and the probe with the model that is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from mindprint.adapter.peft_format import adapter_digest
from mindprint.contract import AdapterState, LoadedModel, TrainingState
from mindprint.data.tokenizer import Tokenizer
from mindprint.errors import MindprintError
from mindprint.models import folder as models
from mindprint.models.engine import Engine, Placement, fits_in_float32
from mindprint.plugins.backend import Backend
from mindprint.trust.adapters import rounded_digests
from mindprint.trust.changes import changes
from mindprint.trust.digests import base_settings, digest_weights
from mindprint.trust.fingerprint import AdapterRecord, BaseRecord, Fingerprint, Measurement, TokenizerRecord
from mindprint.trust.probe import DECIMALS, Probe, measure_noise, score


def take_fingerprint(
    engine: Engine,
    placement: Placement,
    adapter: AdapterState,
    tokenizer: Tokenizer,
    probe: Probe,
    notice: Callable[[str], None] = lambda _: None,
) -> Fingerprint:
    """Return the fingerprint of `adapter` with `engine`'s model at `placement`, loaded only if it is not there.

    A base in a reduced dtype is measured in it first, and then, where it fits, once more in float32, whose noise is
    far below an adapter's effect. The engine holds that model afterwards.
    """
    measurements = tuple(_measurements(engine, placement, adapter, probe, notice))
    records = record_adapter(adapter), record_base(engine.folder), record_tokenizer(tokenizer)
    return Fingerprint(*records, probe, measurements)


def _measurements(
    engine: Engine, placement: Placement, adapter: AdapterState, probe: Probe, notice: Callable[[str], None]
) -> Iterator[Measurement]:
    engine.start_stage(placement, TrainingState(adapter))
    parameters = engine.model.parameters
    yield measure(engine.backend, engine.model, probe)
    # In bfloat16 noise is as large as many adapters' effect. A float32 measurement is the one that proves something.
    # One rank cannot load a sharded base again by itself.
    if placement.dtype == "float32" or placement.shard or not fits_in_float32(parameters):
        return
    try:
        engine.start_stage(replace(placement, dtype="float32"), TrainingState(adapter))
        yield measure(engine.backend, engine.model, probe)
    except (MindprintError, MemoryError, RuntimeError) as error:  # a device's memory is known only by trying
        notice(f"the fingerprint has no float32 measurement: {' '.join(str(error).split())}")


def measure(backend: Backend, model: LoadedModel, probe: Probe) -> Measurement:
    """Score the probe with the model in memory, whose adapter is injected."""
    # Rounded as the file has them, so that comparing in memory and from the file is the same.
    base = np.round(score(backend, model, probe, adapter=False), DECIMALS)
    adapter = np.round(score(backend, model, probe, adapter=True), DECIMALS)
    noise = measure_noise(backend, model, probe, adapter, adapter=True)
    return Measurement(backend.name, model.device, model.dtype, dict(backend.info.libraries), base, adapter, noise)


def record_adapter(adapter: AdapterState) -> AdapterRecord:
    """Return the exact facts of an adapter."""
    lora = adapter.config
    digests = adapter_digest(adapter), rounded_digests(adapter)
    return AdapterRecord(digests[0], lora.r, lora.alpha, lora.use_rslora, changes(adapter), digests[1])


def record_base(base: models.ModelFolder) -> BaseRecord:
    """Return the exact facts of a base, from its folder."""
    return BaseRecord(base.name, base_settings(base), digest_weights(base.path))


def record_tokenizer(tokenizer: Tokenizer) -> TokenizerRecord:
    """Return the exact facts of a tokenizer."""
    return TokenizerRecord(
        tokenizer.digest,
        tokenizer.template_digest,
        tokenizer.stop_token_ids,
        tokenizer.decoder_digest,
        tokenizer.variables_digest,
    )
