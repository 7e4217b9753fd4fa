"""The layer equations of a folded model in plain NumPy, one token after another, and folded models with random weights.

Written from the equations, not from the program: what `entropi.private.compute.program` computes is compared with this.
"""

import numpy as np

from entropi.private.compute.description import FORMAT, Description

FIELDS = dict(
    format=FORMAT,
    architecture="SM",
    layers=3,
    heads=4,
    key_value_heads=4,
    hidden_size=24,
    vocab_size=53,
    positions=24,
    intermediate_size=0,
    position_embedding="learned",
    rotary_dimensions=0,
    rotary_base=10000.0,
    temperature=False,
    softmax="exact",
    norm="none",
    norm_epsilon=1e-5,
    parallel_residual=False,
    activation="identity",
    explicit_ffn=[],
    final_norm="rms",
    centre=True,
    log_length=False,
    head_width=0,
    query_key_norm=False,
    branch_norm=False,
    rotary_frequencies=[],
    rotary_layers=[],
)
# One of everything a folded model can have, and the combinations that share code.
VARIANTS = {
    "softmax only": {},
    "temperature": dict(temperature=True, explicit_ffn=[1]),
    "length": dict(log_length=True, key_value_heads=2, position_embedding="rotary", rotary_dimensions=2),
    "kernel": dict(softmax="power-3", final_norm="none", centre=False),
    "polynomial": dict(softmax="polynomial-1", key_value_heads=2),
    "powers": dict(softmax="polynomial-1/keys", key_value_heads=2, temperature=True, final_norm="none", centre=False),
    "powers over a number": dict(softmax="polynomial-1/9", key_value_heads=2, final_norm="none", centre=False),
    "layer norm": dict(norm="layer", activation="relu", intermediate_size=40, final_norm="layer", centre=False),
    "rms norm, linear map and branch": dict(norm="rms", activation="gelu", intermediate_size=40, explicit_ffn=[0, 2]),
    "rms norm, linear": dict(norm="rms", explicit_ffn=[0, 1, 2]),
    "no norm, relu": dict(activation="relu", intermediate_size=40, explicit_ffn=[0, 1, 2]),
    "square": dict(activation="square", intermediate_size=40),
    "llama": dict(
        norm="rms",
        activation="swiglu",
        intermediate_size=20,
        position_embedding="rotary",
        rotary_dimensions=6,
        key_value_heads=2,
        centre=False,
    ),
    "qwen3": dict(
        norm="rms",
        activation="swiglu",
        intermediate_size=20,
        position_embedding="rotary",
        rotary_dimensions=10,
        head_width=10,
        query_key_norm=True,
        key_value_heads=2,
        centre=False,
    ),
    "gemma3": dict(
        norm="rms",
        activation="geglu",
        intermediate_size=20,
        position_embedding="rotary",
        rotary_dimensions=8,
        rotary_frequencies=[[1.0, 0.1, 0.01, 0.0], [0.9, 0.3, 0.0, 0.0]],
        rotary_layers=[1, 0, 1],
        head_width=8,
        query_key_norm=True,
        branch_norm=True,
        key_value_heads=1,
        centre=False,
    ),
    "norms of branches, parallel": dict(
        norm="rms", activation="relu", intermediate_size=40, branch_norm=True, parallel_residual=True
    ),
    "bilinear": dict(norm="rms", activation="bilinear", intermediate_size=20),
    "gpt-neox": dict(
        norm="rms",
        activation="gelu",
        intermediate_size=40,
        position_embedding="rotary",
        rotary_dimensions=2,
        parallel_residual=True,
    ),
    "parallel, no norm": dict(parallel_residual=True, activation="relu", intermediate_size=40, explicit_ffn=[1]),
    "parallel, linear": dict(parallel_residual=True, norm="layer", explicit_ffn=[0, 1, 2], key_value_heads=1),
}


def describe(**changes):
    return Description(**{**FIELDS, **changes})


def random_weights(model, seed=0, scale=1.0, dtype=np.float32):
    """Weights of about the size that training leaves: rows of q, k and v of size 1, residual branches smaller."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in model.weight_shapes().items():
        part = name.split(".")[-1]
        size = shape[0] ** -0.5 if len(shape) == 2 else 0.1
        if part == "inverse_temperature":
            weights[name] = random.uniform(0.5, 2, shape)
            continue
        if part == "offset":
            weights[name] = random.uniform(3, 5, shape) / (4 if "/" in model.softmax else 1)
            continue
        if part in ("embedding", "positions"):
            size = 0.7
        elif part in ("output", "down"):
            size *= 0.5
        weights[name] = scale * size * random.normal(size=shape)
        if part == "qkv":
            # What nothing divides grows from layer to layer, with the fifth power of its size.
            spread = {"polynomial-1": 3, "polynomial-1/keys": 0.2, "polynomial-1/9": 0.2}.get(model.softmax, 1)
            weights[name][:, : model.query_size] *= model.head_size**-0.5 * spread
        if part in ("ffn", "centre") and model.norm == "none":
            weights[name] = np.eye(len(weights[name])) + 0.3 * weights[name]
    return {name: w.astype(dtype) for name, w in weights.items()}


def reference_logits(model, weights, tokens):
    """Logits `(V,)` after the last of `tokens`, in float64."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    k, eps = model.head_size, model.norm_epsilon
    keys = [[] for _ in range(model.layers)]
    values = [[] for _ in range(model.layers)]

    def norm(x, kind):
        if kind == "none":
            return x
        x = x - x.mean() if kind == "layer" else x
        return x / np.sqrt(np.mean(x * x) + eps)

    def turn(x, position, layer):
        r = model.rotary_dimensions
        if not r:
            return x
        x = x.copy()
        for j in range(r // 2):
            angle = position * model.rotary_base ** (-2 * j / r)
            if model.rotary_frequencies:
                angle = position * model.rotary_frequencies[model.rotary_layers[layer]][j]
            a, b = x[j], x[j + r // 2]
            x[j], x[j + r // 2] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return x

    def activation(x):
        m = model.intermediate_size
        match model.activation:
            case "relu":
                return np.where(x > 0, x, 0)
            case "gelu":
                return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
            case "square":
                return x * x
            case "bilinear":
                return x[:m] * x[m:]
            case "swiglu":
                return x[:m] / (1 + np.exp(-x[:m])) * x[m:]
            case "geglu":
                return x[:m] / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x[:m] + 0.044715 * x[:m] ** 3))) * x[m:]

    def branch(x):
        if not model.branch_norm:
            return x
        plain, gained = np.split(x, 2)
        return gained / np.sqrt(np.mean(plain * plain) + eps)

    def attention(x, layer, position):
        joint = x @ w[f"{layer}.qkv"] + w[f"{layer}.qkv_bias"]
        own, shared = model.heads * k, model.key_value_heads * k
        if model.query_key_norm:
            query, plain_query, key, value, plain_key = np.split(joint, np.cumsum([own, own, shared, shared]))
            for gained, plain in ((query, plain_query), (key, plain_key)):
                for start in range(0, len(gained), k):
                    gained[start : start + k] /= np.sqrt(np.mean(plain[start : start + k] ** 2) + eps)
        else:
            query, key, value = np.split(joint, [own, own + shared])
        keys[layer].append([turn(one, position, layer) for one in key.reshape(-1, k)])
        values[layer].append(value.reshape(-1, k))
        out = []
        for head in range(model.heads):
            group = head // (model.heads // model.key_value_heads)
            q = turn(query[head * k : (head + 1) * k], position, layer)
            if model.temperature:
                q = q * w[f"{layer}.inverse_temperature"][head, position]
            if model.log_length:
                q = q * np.log(position + 1) / np.log(model.positions)
            logits = np.array([q @ one[group] for one in keys[layer]])
            x = logits - logits.max()
            weights_of, _, over = model.softmax.partition("/")
            kind, _, iterations = weights_of.partition("-")
            power = 2 ** int(iterations or 0)
            if kind == "polynomial":
                weights = (logits + w[f"{layer}.offset"][head, position]) ** power
            elif kind == "exact":
                weights = np.exp(x)
            else:
                weights = (1 + np.maximum(x, -0.9 * power) / power) ** power
            divisor = weights.sum()
            if over:
                divisor = (len(weights) if over == "keys" else int(over)) / max(1, model.positions**0.5 / 4)
            out.append(sum(a * one[group] for a, one in zip(weights, values[layer])) / divisor)
        return branch(np.concatenate(out) @ w[f"{layer}.output"] + w[f"{layer}.output_bias"])

    for position, token in enumerate(tokens):
        state = w["embedding"][token]
        if model.position_embedding == "learned":
            state = state + w["positions"][position]
        for layer in range(model.layers):
            before = state
            read = norm(state, model.norm)
            state = state + attention(read, layer, position)
            attended = state - before
            if model.parallel_residual:
                base, added = before, attended
            else:
                read, base, added = norm(state, model.norm), state, 0
            result = base
            if layer in model.explicit_ffn:
                mapped = read @ w[f"{layer}.ffn"] + w[f"{layer}.ffn_bias"]
                result = mapped if model.norm == "none" else base + mapped
            if model.activation != "identity":
                hidden = activation(read @ w[f"{layer}.up"] + w[f"{layer}.up_bias"])
                result = result + branch(hidden @ w[f"{layer}.down"] + w[f"{layer}.down_bias"])
            state = result + added
    if model.centre:
        state = state @ w["centre"]
    return norm(state, model.final_norm) @ w["head"] + w["head_bias"]
