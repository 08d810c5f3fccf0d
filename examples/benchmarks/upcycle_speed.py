"""How fast and how large is upcycling? Against `cp` + sync of the same bytes, and against
mergekit-moe on the same job.

Makes a random dense Llama in bf16, upcycles it by `copy` through the command line (validation off:
this times surgery), copies the result with `cp` and sync, and, where an environment with mergekit
is given, lets mergekit-moe do the same job. Peak memory is the kernel's own figure for the process
(`ru_maxrss`). Every contestant runs `--repeat` times, in turn; all times are printed.

    python examples/benchmarks/upcycle_speed.py --folder /tmp/bench --mergekit /path/to/venv
    --output result.json

The physical limit is the disk's write bandwidth; `cp` is what it gives to a program that does
nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from moe_compose.checkpoint.header import encode_header
from moe_compose.checkpoint.source import TensorInfo

MODELS = {
    "2GB": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "4GB": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 32},
    "small": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8},
}


def llama_tensors(c: dict) -> list[TensorInfo]:
    D, F, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    shapes = {"model.embed_tokens.weight": (V, D)}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (D, D) for p in "qkvo"}
        shapes |= {f"{at}.mlp.{p}_proj.weight": (F, D) for p in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (D, F)
        shapes |= {f"{at}.{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (D,), "lm_head.weight": (V, D)}
    return [TensorInfo.of(n, "BF16", s) for n, s in shapes.items()]


def make_dense(folder: Path, shape: dict[str, int]) -> int:
    """A random dense Llama, written without holding it in memory; returns its bytes."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000,
        "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", **shape,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(Path(__file__).parents[1] / "models/stories260K/tokenizer.json", folder)
    shutil.copy(Path(__file__).parents[1] / "models/stories260K/tokenizer_config.json", folder)
    tensors, rng = llama_tensors(config), np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as f:
        f.write(encode_header(tensors, {"format": "pt"}))
        for t in tensors:
            left = t.numel
            while left:
                n = min(left, 1 << 22)
                values = rng.standard_normal(n, dtype=np.float32) * np.float32(0.02)
                f.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= n
    return sum(t.nbytes for t in tensors)


def timed(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, float]:
    """Wall seconds of a command followed by sync, and its peak resident memory in MiB."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{message.decode()[-2000:]}")
    return seconds, usage.ru_maxrss / 1024


def contestants(folder: Path, experts: int, mergekit: Path | None) -> dict[str, list[str]]:
    dense, moe = folder / "dense", folder / "moe"
    upcycle = [
        sys.executable, "-m", "moe_compose_cli", "upcycle", str(dense), str(moe), "--num-experts",
        str(experts), "--top-k", "2", "--no-validate", "--overwrite", "--quiet",
    ]  # fmt: skip
    commands = {
        "moe-compose upcycle": upcycle,
        "cp": ["cp", "-r", "--reflink=never", str(moe), str(folder / "copy")],
    }
    if mergekit is not None:
        recipe = folder / "mergekit.yml"
        entry = {"source_model": str(dense), "positive_prompts": [""]}
        config = {
            "base_model": str(dense), "gate_mode": "random", "dtype": "bfloat16",
            "experts": [entry] * experts,
        }  # fmt: skip
        recipe.write_text(json.dumps(config))
        commands["mergekit-moe"] = [
            str(mergekit / "bin/mergekit-moe"), str(recipe), str(folder / "mergekit"),
        ]  # fmt: skip
    return commands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="empty folder with enough disk")
    parser.add_argument("--size", choices=list(MODELS), default="2GB")
    parser.add_argument("--experts", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--mergekit", type=Path, help="virtual environment with mergekit")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    dense_bytes = make_dense(args.folder / "dense", MODELS[args.size])
    runs: dict[str, list[tuple[float, float]]] = {}
    for _ in range(args.repeat):
        for name, command in contestants(args.folder, args.experts, args.mergekit).items():
            for leftover in ("copy", "mergekit"):
                shutil.rmtree(args.folder / leftover, ignore_errors=True)
            runs.setdefault(name, []).append(timed(command))
            print(f"{name}: {runs[name][-1][0]:.1f} s, {runs[name][-1][1]:.0f} MiB", flush=True)
    moe_bytes = sum(p.stat().st_size for p in (args.folder / "moe").glob("*.safetensors"))
    best = {name: min(s for s, _ in found) for name, found in runs.items()}
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "dense_bytes": dense_bytes,
        "moe_bytes": moe_bytes,
        "experts": args.experts,
        "runs": {n: [{"seconds": s, "peak_mib": m} for s, m in r] for n, r in runs.items()},
        "best_seconds": best,
        "ratio_to_cp": {n: s / best["cp"] for n, s in best.items()},
        "gb_per_second": {n: moe_bytes / 1e9 / s for n, s in best.items()},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
