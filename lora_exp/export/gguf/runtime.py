"""llama.cpp itself, out of the ``xllamacpp`` package, at work on one file.

Only for a process of its own: it takes over signals, and ends what does not suit it by ending the process.

Letters: N texts, T tokens a text, V entries of the vocabulary.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lora_exp.errors import UserError
from lora_exp.export.gguf.packages import xllamacpp

_LEAST = -1e4  # the logarithm of a probability that is 0 in float32
_BATCH = 512
LIKELIEST = 1000


class Llama:
    """A GGUF loaded, a GGUF LoRA on it or none. Answers to this process alone, on a port of 127.0.0.1 that is free."""

    def __init__(self, model: Path, lora: Path | None = None, context: int = 512) -> None:
        library = xllamacpp("a look at a GGUF")
        params = library.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = context, _BATCH, _BATCH, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.port = 0  # any that is free; the host is 127.0.0.1 unless it is changed
        params.cache_type_k = params.cache_type_v = library.ggml_type.GGML_TYPE_F32  # of keys and values: no rounding
        params.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.swa_full = True  # what a window has left is kept, or a text that follows sees another's
        params.warmup, params.verbosity, params.n_gpu_layers, params.fit_params = False, -1, 0, False
        if lora is not None:
            params.lora_adapters = [library.CommonAdapterLoraInfo(str(lora), 1.0)]
        try:
            self._server: Any = library.Server(params)
        except RuntimeError as error:
            files = " with ".join(file.name for file in (model, lora) if file is not None)
            raise UserError(f"llama.cpp cannot load {files}: {error}") from error
        address = str(self._server.listening_address).removeprefix("http://")
        self._host, _, self._port = address.rpartition(":")
        self.vocabulary: int = self._ask("/v1/models")["data"][0]["meta"]["n_vocab"]
        self._plain = self.tokenize("a")[-1]  # a token of a whole character
        self.generate([self._plain], 1)  # its loop has begun: one that is told to end before it has never ends

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._server

    def tokenize(self, text: str) -> list[int]:
        """A text's tokens, special ones recognised in it and none added."""
        asked = {"content": text, "add_special": False, "parse_special": True}
        found: list[int] = self._ask("/tokenize", asked)["tokens"]
        return found

    def generate(self, tokens: Sequence[int], length: int) -> list[int]:
        """The likeliest tokens that follow, as many as ``length`` or up to an end of text."""
        asked = {"prompt": list(tokens), "n_predict": length, "temperature": 0.0, "top_k": 1, "return_tokens": True}
        found: list[int] = self._ask("/completion", {**asked, "cache_prompt": False})["tokens"]
        return found

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """(N, T, V) of the next token, from (N, T): of the ``LIKELIEST`` entries at each place, NaN of the others.

        The server hands out log-probabilities alone, and each costs it a piece of JSON.
        """
        return torch.stack([self._of_text(row.tolist()) for row in tokens])

    def _of_text(self, tokens: list[int]) -> Tensor:
        return torch.stack([self._after(tokens[: end + 1]) for end in range(len(tokens))])

    def _after(self, tokens: list[int]) -> Tensor:
        """(V,), of the token after these."""
        asked = {
            "prompt": tokens, "n_predict": 1, "n_probs": min(self.vocabulary, LIKELIEST), "cache_prompt": True,
            # A piece of a character, or an end, is answered without probabilities: those are of before the bias.
            "logit_bias": [[self._plain, 1e4]], "temperature": 0.0,
        }  # fmt: skip
        entries = self._ask("/completion", asked)["completion_probabilities"][0]["top_logprobs"]
        found = torch.full((self.vocabulary,), torch.nan)
        found[[entry["id"] for entry in entries]] = torch.tensor([max(entry["logprob"], _LEAST) for entry in entries])
        return found

    def _ask(self, path: str, asked: dict[str, object] | None = None) -> Any:
        connection = http.client.HTTPConnection(self._host, int(self._port), timeout=600)
        try:
            body = None if asked is None else json.dumps(asked)
            connection.request("GET" if body is None else "POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            found = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status != 200:
            raise RuntimeError(f"llama.cpp answers {path} with {answer.status}: {found}")
        return found
