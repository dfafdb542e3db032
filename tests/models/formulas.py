"""The reference models once more, as formulas over named weights: float64, no modules, attention written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def weights_of(model: torch.nn.Module) -> Weights:
    """All parameters by name, in float64."""
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def rms(x: Tensor, eps: float, gain: Tensor | float = 1.0) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * gain`."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def turned(x: Tensor, theta: float) -> Tensor:
    """Neighbouring channels of `[batch, seq, heads, size]` as complex numbers, rotated by their position."""
    size = x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None, None] * theta ** (-torch.arange(0, size, 2).double() / size)
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax over earlier positions, one query position at a time; `[batch, seq, heads, size]`, with heads
    adjacent."""
    rows = []
    for position in range(query.shape[1]):
        scores = torch.einsum("bhd,bkhd->bhk", query[:, position], key[:, : position + 1]) / math.sqrt(query.shape[-1])
        rows.append(torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), value[:, : position + 1]).flatten(1))
    return torch.stack(rows, 1)


def loopformer(w: Weights, ids: Tensor, steps: tuple[float, ...], layers: int, heads: int) -> Tensor:
    """Logits of LoopFormer without biases; norms without gain have the machine epsilon of float32."""
    eps = torch.finfo(torch.float32).eps

    def embedded(name: str, number: float) -> Tensor:
        angles = number * 10_000.0 ** (-torch.arange(128).double() / 128)
        hidden = w[f"{name}.mlp.0.weight"] @ torch.cat([angles.cos(), angles.sin()]) + w[f"{name}.mlp.0.bias"]
        return w[f"{name}.mlp.2.weight"] @ (hidden * hidden.sigmoid()) + w[f"{name}.mlp.2.bias"]

    x, time = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: ids.shape[1]], 0.0
    for step in steps:
        c = embedded("time_embedder", time) + embedded("dt_embedder", step)
        for layer in range(layers):
            own = {k.removeprefix(p): v for k, v in w.items() if k.startswith(p := f"transformer.h.blocks.{layer}.")}
            gates = own["adaLN_modulation.1.weight"] @ (c * c.sigmoid()) + own["adaLN_modulation.1.bias"]
            gate_1, gate_2, scale_1, scale_2 = gates.chunk(4)
            joint = rms(x, eps) * (1 + scale_1) @ own["attn.c_attn.weight"].T
            query, key, value = (part.unflatten(-1, (heads, -1)) for part in joint.chunk(3, -1))
            x = x + gate_1 * (attention(query, key, value) @ own["attn.c_proj.weight"].T)
            inner = rms(x, eps) * (1 + scale_2) @ own["mlp.c_fc.weight"].T
            gelu = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
            x = x + gate_2 * (gelu @ own["mlp.c_proj.weight"].T)
        time += step
    return rms(x, eps, w["transformer.norm_f.weight"]) @ w["lm_head.weight"].T


def huginn(w: Weights, ids: Tensor, state: Tensor, loops: int, heads: int) -> Tensor:
    """Logits of Huginn with biases of queries and keys, one layer in prelude, core and coda."""

    def layer(name: str, x: Tensor) -> Tensor:
        own = {k.removeprefix(p): v for k, v in w.items() if k.startswith(p := f"transformer.{name}.0.")}
        joint = rms(x, 1e-6, own["norm_1.weight"]) @ own["attn.Wqkv.weight"].T
        query, key, value = (part.unflatten(-1, (heads, -1)) for part in joint.chunk(3, -1))
        query, key = turned(query + own["attn.qk_bias"][0], 50_000), turned(key + own["attn.qk_bias"][1], 50_000)
        x = rms(attention(query, key, value) @ own["attn.proj.weight"].T + x, 1e-6, own["norm_2.weight"])
        gate, up = (rms(x, 1e-6, own["norm_3.weight"]) @ own["mlp.fc.weight"].T).chunk(2, -1)
        return rms(gate * gate.sigmoid() * up @ own["mlp.proj.weight"].T + x, 1e-6, own["norm_4.weight"])

    final = w["transformer.ln_f.weight"]
    injected = layer("prelude", w["transformer.wte.weight"][ids] * math.sqrt(state.shape[-1]))
    x = state.double()
    for _ in range(loops):
        x = layer("core_block", torch.cat([x, injected], -1) @ w["transformer.adapter.weight"].T)
    return rms(layer("coda", rms(x, 1e-6, final)), 1e-6, final) @ w["lm_head.weight"].T


def parcae(w: Weights, ids: Tensor, state: Tensor, loops: int, heads: int, injection: str, cap: float) -> Tensor:
    """Logits of Parcae with one layer in prelude, core and coda, of which first and last have value embeddings."""
    eps = 1e-5

    def layer(name: str, x: Tensor, values: str) -> Tensor:
        own = {k.removeprefix(p): v for k, v in w.items() if k.startswith(p := f"transformer.{name}.0.")}
        normed = rms(x, eps, own["norm_1.weight"])
        query, key, value = ((normed @ own[f"attn.c_{p}.weight"].T).unflatten(-1, (heads, -1)) for p in "qkv")
        if f"value_embeds.{values}.weight" in w:
            gate = 2 * (normed[..., :32] @ own["attn.ve_gate.weight"].T).sigmoid()
            value = value + gate[..., None] * w[f"value_embeds.{values}.weight"][ids].unflatten(-1, (heads, -1))
        machine = torch.finfo(torch.float32).eps
        query, key = rms(turned(query, 50_000), machine), rms(turned(key, 50_000), machine)
        x = x + attention(query, key, value) @ own["attn.c_proj.weight"].T
        inner = rms(x, eps, own["norm_2.weight"]) @ own["mlp.fc.weight"].T
        return x + 0.5 * inner.clamp_min(0) ** 2 @ own["mlp.proj.weight"].T

    def inject(x: Tensor, e: Tensor) -> Tensor:
        if injection == "add":
            return x + e
        if injection == "linear":
            return torch.cat([x, e], -1) @ w["transformer.adapter.adapter.weight"].T
        step = (1 + w["transformer.adapter.dt_bias"].exp()).log()
        decay = (-step * w["transformer.adapter.A_log"].exp()).exp()
        return decay * x + step * (e @ w["transformer.adapter.B"].T)

    e = rms(layer("prelude", w["transformer.wte.weight"][ids], "0"), eps, w["transformer.ln_prelude.weight"])
    x = state.double()
    for _ in range(loops):
        x = layer("core_block", inject(x, e), "1")
    x = layer("coda", x @ w["transformer.C.weight"].T, "2")
    return cap * (rms(x, eps, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T / cap).tanh()
