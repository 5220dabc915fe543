"""Make `models/demo`: a Llama-architecture model of about 1M parameters that answers in real words.

    kvarena make train_demo --seconds 120 --out models/demo

The text is on every machine: the docstrings of the running Python's standard library, and the licence texts in
/usr/share/common-licenses where that folder exists. Part of it is put into chat form, so that an answer ends with
`<|im_end|>`. With `--steps` the run is a function of the seed, the text and the library versions; with `--seconds`
the number of steps is what the machine manages.
"""

from __future__ import annotations

import ast
import json
import math
import random
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvarena.experiments.tools import tool_parser

END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 2048
MAX_LEN = 8192
SYSTEM = "You are a helpful assistant."
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LICENSE_FOLDER = Path("/usr/share/common-licenses")
QUESTIONS = (
    "What does {name} do?",
    "What is {name}?",
    "Explain {name}.",
    "Tell me about {name} in Python.",
    "How do I use {name}?",
)
# The model's small talk. Written for this file.
DIALOGUES = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hello! Ask me about the Python standard library."),
    (
        "Who are you?",
        "I am a small demo model. I was trained on the documentation of the Python standard library, "
        "and I often make mistakes.",
    ),
    ("What can you do?", "I can write short answers in the style of the Python documentation."),
    ("Thank you!", "You are welcome."),
    ("Tell me a story.", "I only know the Python standard library. Once there was a function that returned a value."),
    (
        "What is a KV cache?",
        "A KV cache is a region of memory that holds the keys and the values of all tokens, so that each new token "
        "is computed only once.",
    ),
    (
        "What is paging?",
        "Paging is the use of small blocks of memory. Each request has a table of the blocks that it owns.",
    ),
    ("What is Python?", "Python is a programming language. It has a large standard library."),
    ("Goodbye", "Goodbye!"),
)


class Docstring(NamedTuple):
    """A docstring and the qualified name of what it documents."""

    name: str
    text: str


def standard_library_docstrings() -> list[Docstring]:
    """All docstrings of the standard library's Python sources, in path order; tests and installed packages left out."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skipped.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and files in other encodings
        module = ".".join(part for part in parts if part != "__init__")
        found += _docstrings(tree, module)
    return found


def _docstrings(node: ast.AST, name: str) -> list[Docstring]:
    found = []
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            found.append(Docstring(name, text))
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found += _docstrings(child, f"{name}.{child.name}")
    return found


def license_texts() -> list[str]:
    """The licence texts of a Debian-like system, each once; none elsewhere."""
    if not LICENSE_FOLDER.is_dir():
        return []
    files = sorted({path.resolve() for path in LICENSE_FOLDER.iterdir() if path.is_file()})
    return [path.read_text(encoding="utf-8", errors="ignore") for path in files]


def chat(messages: list[tuple[str, str]]) -> str:
    """`messages`, (role, content) pairs, in the chat template's form."""
    return "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in messages)


def chat_documents(docstrings: list[Docstring], rng: random.Random) -> list[str]:
    """Questions about named things, answered by the first paragraph of their docstring; and small talk."""
    pairs = []
    for name, text in docstrings:
        answer = " ".join(text.split("\n\n")[0].split())
        if 20 <= len(answer) <= 400 and not name.rsplit(".", 1)[-1].startswith("_"):
            short = ".".join(name.split(".")[-2:])
            pairs.append((rng.choice(QUESTIONS).format(name=short), answer))
    pairs += [pair for pair in DIALOGUES for _ in range(40)]
    rng.shuffle(pairs)
    documents = []
    while pairs:
        turns, pairs = pairs[: rng.choice((1, 1, 2))], pairs[2:]
        messages = [("system", SYSTEM)] if rng.random() < 0.3 else []
        for question, answer in turns:
            messages += [("user", question), ("assistant", answer)]
        documents.append(chat(messages))
    return documents


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens: every UTF-8 text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=IM_END,
        pad_token=END,
        model_max_length=MAX_LEN,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model() -> LlamaForCausalLM:
    """The untrained model, fp32."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LEN,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[2, 0], pad_token_id=0)
    return model


def sample_batch(token_ids: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """2,048 tokens a batch: rows of 256, and every eighth time rows of 1,024 for the longer context."""
    num_rows, length = (2, 1024) if step % 8 == 7 else (8, 256)
    starts = torch.randint(0, len(token_ids) - length - 1, (num_rows,), generator=generator)
    return token_ids[starts[:, None] + torch.arange(length + 1)]


def train(model: LlamaForCausalLM, token_ids: Tensor, seed: int, steps: int | None, seconds: float) -> dict[str, Any]:
    """Train in place for `steps` steps, or for `seconds` when `steps` is None. Returns the run's figures."""
    # Muon (Jordan et al., 2024) for the matrices, AdamW for the rest.
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=2e-2, momentum=0.95, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True),
    ]
    base_lr = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    generator = torch.Generator().manual_seed(seed)
    begin = last_report = time.perf_counter()
    step, loss_mean, num_tokens = 0, 0.0, 0
    while True:
        elapsed = time.perf_counter() - begin
        fraction = step / steps if steps is not None else elapsed / seconds
        if fraction >= 1:
            break
        scale = min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * fraction)))
        for optimizer, lr in zip(optimizers, base_lr, strict=True):
            optimizer.param_groups[0]["lr"] = lr * scale
        batch = sample_batch(token_ids, step, generator)
        logits = model(batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        num_tokens += batch[:, 1:].numel()
        loss_mean = loss.item() if step == 1 else 0.97 * loss_mean + 0.03 * loss.item()
        if time.perf_counter() - last_report > 10:
            last_report = time.perf_counter()
            print(f"step {step}: loss {loss_mean:.3f}, {num_tokens / (last_report - begin):.0f} tokens/s", flush=True)
    return {
        "steps": step,
        "loss": round(loss_mean, 4),
        "train_tokens": num_tokens,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main(argv: Sequence[str]) -> int:
    """Train and save; the last line of stdout is JSON."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="directory to write")
    parser.add_argument("--seconds", type=float, default=120.0, help="training time")
    parser.add_argument("--steps", type=int, default=None, help="number of steps; overrides --seconds")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order of texts and chats")
    args = parser.parse_args(argv)

    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    docstrings = standard_library_docstrings()
    texts = [doc.text for doc in docstrings if len(doc.text) > 120] + license_texts()
    chats = chat_documents(docstrings, rng)
    tokenizer = train_tokenizer(texts + [c.replace(IM_START, "").replace(IM_END, "") for c in chats])
    documents = texts + chats
    rng.shuffle(documents)
    encoded = tokenizer.backend_tokenizer.encode_batch(documents)
    token_ids = torch.tensor([token for encoding in encoded for token in (0, *encoding.ids)])
    print(
        f"{len(texts)} texts, {len(chats)} chats, {len(token_ids)} tokens, Python {sys.version.split()[0]}", flush=True
    )

    model = build_model().train()
    figures = train(model, token_ids, args.seed, args.steps, args.seconds)
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out, save_jinja_files=False)
    figures |= {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "text_tokens": len(token_ids),
        "seed": args.seed,
        "out": str(args.out),
    }
    print(json.dumps(figures))
    return 0
