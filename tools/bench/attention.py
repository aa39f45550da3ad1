"""Attention: what it adds to a training step, and how time and memory grow with the number of tokens.

Usage: python tools/bench/attention.py [--batch 16] [--steps 10]. Prints the time of a training step of each network of
chapter 5 as a ratio to the U-Net's (protocol S: 128 x 128, width 16, channels_last, and bf16 where the CPU has it), of
the fused attention as a ratio to the explicit one, and the peak memory of a cross-attention's training step for growing
numbers of tokens (on Linux), each in a process of its own, with values padded to the queries' width (as organseg does)
and not.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from organseg.losses import marginal_loss
from organseg.networks import UTransformer
from organseg.networks.attention import attend, attention_weights
from organseg.runtime.precision import bf16_in_hardware

NETWORKS = {
    "U-Net": {"mhsa": False, "mhca": False},
    "Attention U-Net": {"backbone": "attention_unet", "mhsa": False, "mhca": False},
    "MHSA": {"mhca": False},
    "MHCA": {"mhsa": False},
    "U-Transformer": {},
    "of 64 keys": {"keys": 64},
    "at all skips": {"keys": 64, "levels": 4},
}
TOKENS = (1024, 2048, 4096, 8192)
CHANNELS, HEADS = 256, 8


def seconds(work: Callable[[], None], repeats: int) -> float:
    """Of one call, after two that do not count."""
    for repeat in range(repeats + 2):
        if repeat == 2:
            start = time.perf_counter()
        work()
    return (time.perf_counter() - start) / repeats


def training_step(network: nn.Module, batch: int) -> Callable[[], None]:
    """Forward, loss, backward and optimiser."""
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    image = torch.randn(batch, 1, 128, 128).contiguous(memory_format=torch.channels_last)
    label = torch.randint(0, 8, (batch, 128, 128), dtype=torch.uint8)
    annotated = torch.ones(batch, 7, dtype=torch.bool)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16_in_hardware()):
            logits = network(image)
        optimizer.zero_grad()
        marginal_loss(logits, label, annotated).backward()
        optimizer.step()

    return step


def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same with all weights in memory."""
    return attention_weights(query, key).to(value.dtype) @ value


def unpadded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The library's call as it is."""
    return F.scaled_dot_product_attention(query, key, value)


KINDS = {"fused": attend, "unpadded": unpadded, "explicit": explicit}


def tensors(tokens: int) -> list[Tensor]:
    """Queries and keys, and values of half their width, as at a skip."""
    widths = (CHANNELS // HEADS, CHANNELS // HEADS, CHANNELS // HEADS // 2)
    return [torch.randn(1, HEADS, tokens, width, dtype=torch.bfloat16, requires_grad=True) for width in widths]


def attention_step(attention: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: int) -> Callable[[], None]:
    """Forward and backward."""
    inputs = tensors(tokens)
    return lambda: attention(*inputs).sum().backward()


def peak_mb(kind: str, tokens: int) -> float:
    """Of forward and backward, in a new process."""
    words = [sys.executable, __file__, "--child", kind, str(tokens)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def child(kind: str, tokens: int) -> None:
    """Print by how much forward and backward raise the peak of this process."""
    KINDS["fused"](*tensors(16)).sum().backward()
    inputs = tensors(tokens)
    before = peak_kb()
    KINDS[kind](*inputs).sum().backward()
    print((peak_kb() - before) / 1024)


def peak_kb() -> int:
    """Of this process: `getrusage` begins with what its parent had."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--child", nargs=2, metavar=("KIND", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child[0], int(arguments.child[1]))
    plain = 0.0
    for name, options in NETWORKS.items():
        network = UTransformer(1, 8, width=16, options={"norm_after": "convolution"}, **options)
        taken = seconds(training_step(network, arguments.batch), arguments.steps)
        plain = plain or taken
        print(f"training step, {name:<16} {1000 * taken:8.0f} ms  {taken / plain:5.2f} x U-Net", flush=True)
    for tokens in TOKENS[:3]:
        fused, whole = (seconds(attention_step(KINDS[kind], tokens), arguments.steps) for kind in ("fused", "explicit"))
        print(
            f"attention, {tokens:5d} tokens: fused {1000 * fused:7.1f} ms, explicit {whole / fused:5.1f} x", flush=True
        )
    for kind in KINDS:
        sizes = TOKENS if kind != "explicit" else TOKENS[:3]
        peaks = ", ".join(f"{tokens}: {peak_mb(kind, tokens):.0f}" for tokens in sizes)
        print(f"peak memory of a step, {kind:<9} MB by tokens: {peaks}", flush=True)


if __name__ == "__main__":
    main()
