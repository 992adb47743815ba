"""One voice, one row, no loop: the pieces under `mindprint.train`, used one by one, with `import mindprint` alone."""

from pathlib import Path
from tempfile import mkdtemp

import mindprint
from mindprint import LoraConfig, ModelConfig, ModelSpec, Origin, Sampling, SftRow, Update

# Load: core finds the folder and the tokenizer, the backend loads the model.
folder = mindprint.resolve_model(ModelConfig(name="builtin:tiny"), Path.cwd())
data = mindprint.DataConfig(chat_template_kwargs={})  # variables for the chat template, if it has any
tokenizer = mindprint.load_tokenizer(folder.path, data.chat_template_kwargs)
backend = mindprint.load_backend("torch")  # or "mlx": nothing below changes
model = backend.load_model(ModelSpec(str(folder.path), device="cpu", dtype="float32"))

# Inject: core decides where the adapter goes and how it starts.
sites = backend.adapter_sites(model)
lora = LoraConfig(r=8, alpha=16, target_modules=mindprint.resolve_targets(sites, "all-linear"))
backend.inject_adapter(model, mindprint.initial_adapter(sites, lora, seed=0))

# Step: a row becomes tokens and a mask, a batch, and twenty optimizer steps.
row = SftRow("harbour", "How is the harbour today?", "Calm, my dear, and full of gulls.", Origin("step_by_step.py", 1))
batch = mindprint.sft_batch(mindprint.render_sft([row], tokenizer, data).examples, tokenizer.pad_id)
for step in range(20):
    metrics = backend.sft_step(model, [batch], Update(learning_rate=3e-3, tokens=batch.loss_tokens))
    print(f"step {step + 1:2d}  loss {metrics.loss:.4f}  gradient {metrics.grad_norm:.3f}")

# Use and save: the result is a PEFT adapter.
prompt = mindprint.render_prompt("How is the harbour today?", tokenizer)
answer = backend.generate(model, [prompt], Sampling(max_new_tokens=32, stop_token_ids=tokenizer.stop_token_ids))[0]
print(tokenizer.answer_text(answer.tokens.tolist(), prompt.tolist()))
mindprint.write_adapter(output := Path(mkdtemp()), backend.save(model).adapter, base_model="builtin:tiny")
print("adapter:", output)
