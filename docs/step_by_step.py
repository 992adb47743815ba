"""One voice, one row, no loop: the pieces under `mindprint.train`, used one by one."""

from pathlib import Path
from tempfile import mkdtemp

from mindprint import LoraConfig, ModelSpec, Sampling, Update, load_backend
from mindprint.adapter.initial import initial_adapter
from mindprint.adapter.peft_format import write_adapter
from mindprint.adapter.targets import resolve_targets
from mindprint.config import DataConfig, ModelConfig
from mindprint.data.collate import sft_batch
from mindprint.data.render import render_prompt, render_sft
from mindprint.data.rows import Origin, SftRow
from mindprint.data.tokenizer import load_tokenizer
from mindprint.models.folder import resolve_model

# Load: a folder and a tokenizer are core's business, the model is the backend's.
folder = resolve_model(ModelConfig(name="builtin:tiny"), Path.cwd())
tokenizer = load_tokenizer(folder.path)
backend = load_backend("torch")  # or "mlx": nothing below changes
model = backend.load_model(ModelSpec(str(folder.path), device="cpu", dtype="float32"))

# Inject: core decides where the adapter goes and how it starts.
sites = backend.adapter_sites(model)
lora = LoraConfig(r=8, alpha=16, target_modules=resolve_targets(sites, "all-linear"))
backend.inject_adapter(model, initial_adapter(sites, lora, seed=0))

# Step: a row becomes tokens and a mask, a batch, and twenty optimizer steps.
row = SftRow("harbour", "How is the harbour today?", "Calm, my dear, and full of gulls.", Origin("step_by_step.py", 1))
batch = sft_batch(render_sft([row], tokenizer, DataConfig()).examples, tokenizer.pad_id)
for step in range(20):
    metrics = backend.sft_step(model, [batch], Update(learning_rate=3e-3, tokens=batch.loss_tokens))
    print(f"step {step + 1:2d}  loss {metrics.loss:.4f}  gradient {metrics.grad_norm:.3f}")

# Use and save: what comes out is a PEFT adapter.
prompt = render_prompt("How is the harbour today?", tokenizer)
answer = backend.generate(model, [prompt], Sampling(max_new_tokens=32, stop_token_ids=tokenizer.stop_token_ids))[0]
print(tokenizer.decode(answer.tokens.tolist()))
write_adapter(output := Path(mkdtemp()), backend.save(model).adapter, base_model="builtin:tiny")
print("adapter:", output)
