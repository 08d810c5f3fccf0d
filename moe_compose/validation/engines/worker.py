"""Greedy tokens and their logprobs from one engine, in a process of its own.

    python worker.py vllm

Standard library and the engine only, so that any environment can run it. A job comes in as JSON on
stdin: `models` (folders), `prompts` (token ids), `new_tokens`. JSON lines go out on stdout:
`{"version"}` or `{"unavailable"}`, then for every model `{"path", "answers", "notes"}` or
`{"path", "error"}`. All is computed in float32, and no end token ends an answer.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

#: `[vocabulary]` logprobs after every token of a sequence, `[tokens, vocabulary]`.
Next = Callable[[Sequence[int]], Any]
Prompts = Sequence[Sequence[int]]
Answer = dict[str, Any]


def greedy(step: Next, prompt: Sequence[int], new_tokens: int) -> Answer:
    """The prompt's logprobs, then the likeliest token again and again.

    Args:
        step: takes further tokens, gives logprobs after each, `[tokens, vocabulary]`, as numpy.
        prompt: token ids.
        new_tokens: how many to generate.

    Returns:
        `prompt`: the logprob of each of its tokens but the first; `tokens` and `logprobs`.
    """
    table = step(prompt)
    answer: Answer = {
        "prompt": [float(table[i, t]) for i, t in enumerate(prompt[1:])],
        "tokens": [],
        "logprobs": [],
    }
    for i in range(new_tokens):
        token = int(table[-1].argmax())
        answer["tokens"].append(token)
        answer["logprobs"].append(float(table[-1, token]))
        if i + 1 < new_tokens:
            table = step([token])
    return answer


def log_softmax(logits: Any) -> Any:
    """In float64, over the last dimension of a numpy array."""
    import numpy as np

    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def run_transformers(folder: Path, prompts: Prompts, new_tokens: int, notes: list[str]) -> Any:
    """transformers 4 or 5, eager experts; tensors that it misses or ignores are an error."""
    import torch
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
    if wrong:
        raise ValueError(f"loaded with {wrong}")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")

    def start() -> Next:
        past: list[Any] = [None]

        @torch.inference_mode()
        def step(tokens: Sequence[int]) -> Any:
            out = model(torch.tensor([tokens]), past_key_values=past[0], use_cache=True)
            past[0] = out.past_key_values
            return log_softmax(out.logits[0])

        return step

    model.eval()
    return [greedy(start(), prompt, new_tokens) for prompt in prompts]


def run_mlx_lm(folder: Path, prompts: Prompts, new_tokens: int, notes: list[str]) -> Any:
    """mlx-lm, which is strict about missing and surplus tensors."""
    os.environ["MLX_DISABLE_COMPILE"] = "1"  # it would start a C++ compiler per kernel on a CPU
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)

    def start() -> Next:
        cache = make_prompt_cache(model)
        return lambda tokens: log_softmax(np.array(model(mx.array([tokens]), cache=cache)[0]))

    return [greedy(start(), prompt, new_tokens) for prompt in prompts]


def run_llama_cpp(folder: Path, prompts: Prompts, new_tokens: int, notes: list[str]) -> Any:
    """llama.cpp: the folder converted to GGUF, and that through llama-cpp-python."""
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "model.gguf"
        _convert(folder, file, notes)
        model = Llama(
            str(file),
            n_ctx=max(map(len, prompts)) + new_tokens,
            logits_all=True,
            type_k=0,
            type_v=0,
            flash_attn=False,
            verbose=False,
        )

        def step(tokens: Sequence[int]) -> Any:
            before = model.n_tokens
            model.eval(tokens)
            return log_softmax(model.scores[before : model.n_tokens])

        answers = []
        for prompt in prompts:
            model.reset()
            answers.append(greedy(step, prompt, new_tokens))
        model.close()
    return answers


def converter() -> Path:
    """llama.cpp's converter of Hugging Face folders: on PATH, or where this Python's environment
    keeps the sources that llama-cpp-python was built from.
    """
    name = "convert_hf_to_gguf.py"
    found = shutil.which(name)
    path = Path(found) if found else Path(sys.prefix, "source/vendor/llama.cpp", name)
    if not path.exists():
        raise FileNotFoundError(f"no {name} on PATH or in {path.parent}")
    return path


def _convert(folder: Path, file: Path, notes: list[str]) -> None:
    """To float32, by llama.cpp's own converter."""
    path = converter()
    for root in (path.parent / "gguf-py", path.parent):
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
    from runpy import run_path

    said: list[str] = []
    ear = logging.Handler(logging.ERROR)
    ear.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(ear)
    arguments, sys.argv = sys.argv, [str(path), str(folder), "--outtype", "f32"]
    sys.argv += ["--outfile", str(file)]
    try:
        with _any_tokenizer(notes):
            run_path(str(path), run_name="__main__")
    except SystemExit as e:
        if e.code:
            raise RuntimeError("; ".join(said) or f"the converter ended with {e.code}") from e
    finally:
        sys.argv = arguments
        logging.getLogger().removeHandler(ear)


@contextmanager
def _any_tokenizer(notes: list[str]) -> Iterator[None]:
    """The converter knows tokenizers by a hash; an unknown one is no hindrance for token ids."""
    from conversion.base import TextModel

    original = TextModel.get_vocab_base_pre

    def known(self: Any, tokenizer: Any) -> Any:
        try:
            return original(self, tokenizer)
        except NotImplementedError:
            notes.append("the converter does not know this tokenizer: only token ids were compared")
            return "default"

    TextModel.get_vocab_base_pre = known
    try:
        yield
    finally:
        TextModel.get_vocab_base_pre = original


def run_vllm(folder: Path, prompts: Prompts, new_tokens: int, notes: list[str]) -> Any:
    """vLLM in this process."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")
    for name, value in (("KVCACHE_SPACE", "1"), ("OMP_THREADS_BIND", "nobind")):
        os.environ.setdefault(f"VLLM_CPU_{name}", value)
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    more: dict[str, Any] = {}
    if current_platform.is_cpu() and "kv_lora_rank" in json.loads(
        (folder / "config.json").read_text()
    ):
        more["attention_backend"] = "CPU_MLA"  # the faster one, for AMX, knows no float32
    model = LLM(
        model=str(folder),
        dtype="float32",
        enforce_eager=True,
        trust_remote_code=False,
        max_model_len=max(map(len, prompts)) + new_tokens,
        enable_prefix_caching=False,
        skip_tokenizer_init=not list(folder.glob("tokenizer*")),
        # The CPU build's own rotary operation is wrong for multi-head latent attention.
        compilation_config={"custom_ops": ["none"]},
        **more,
    )
    wanted = SamplingParams(
        temperature=0.0,
        max_tokens=new_tokens,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0,
        detokenize=False,
    )
    found = model.generate([{"prompt_token_ids": list(p)} for p in prompts], wanted, use_tqdm=False)
    answers = []
    for prompt, request in zip(prompts, found, strict=True):
        out = request.outputs[0]
        steps = zip(out.token_ids, out.logprobs, strict=True)
        said = zip(prompt[1:], request.prompt_logprobs[1:], strict=True)
        answers.append(
            {
                "prompt": [step[t].logprob for t, step in said],
                "tokens": list(out.token_ids),
                "logprobs": [step[t].logprob for t, step in steps],
            }
        )
    return answers


#: Word on the command line → what runs it, and the module to import.
ENGINES: dict[str, tuple[Callable[..., Any], str]] = {
    "transformers": (run_transformers, "transformers"),
    "mlx-lm": (run_mlx_lm, "mlx_lm"),
    "llama.cpp": (run_llama_cpp, "llama_cpp"),
    "vllm": (run_vllm, "vllm"),
}


def main() -> None:
    """Run the job on stdin."""
    run, name = ENGINES[sys.argv[1]]
    job = json.load(sys.stdin)
    # Whatever else speaks, in Python or below, is no finding.
    findings = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(line: dict[str, Any]) -> None:
        findings.write(json.dumps(line) + "\n")
        findings.flush()

    try:
        engine = import_module(name)
        if run is run_llama_cpp:
            converter()
    except Exception as e:  # a broken install raises whatever it likes
        return say({"unavailable": _line(e)})
    say({"version": getattr(engine, "__version__", "?")})
    for path in job["models"]:
        notes: list[str] = []
        try:
            answers = run(Path(path), job["prompts"], job["new_tokens"], notes)
            say({"path": path, "answers": answers, "notes": sorted(set(notes))})
        except Exception as e:  # whatever an engine raises is what it says of this checkpoint
            say({"path": path, "error": _line(e)})
        gc.collect()


def _line(e: Exception) -> str:
    said = " ".join(str(e).split())
    return f"{type(e).__name__}: {said}" if said else repr(e)


if __name__ == "__main__":
    main()
