"""The real server, asked as its users ask it: by OpenAI's client, in numbers, and wrongly."""

from __future__ import annotations

import itertools
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
Alone = Callable[..., str]
NAMES = ["tiny", "plain", "dora", "wide"]
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(start: Callable[..., Any], adapter_folders: dict[str, Path]) -> Any:
    runs = ",".join(str(folder) for folder in adapter_folders.values())
    return start(f"run=[{runs}]", f"serve.names=[{','.join(adapter_folders)}]", "serve.max_body_kb=64")


def completed(server: Any, name: str, prompt: str, **options: Any) -> str:
    made = server.client().completions.create(model=name, prompt=prompt, **{**GREEDY, **options})
    return str(made.choices[0].text)


def test_the_base_and_each_adapter_are_listed(server: Any) -> None:
    cards = server.client().models.list().data
    assert [card.id for card in cards] == NAMES
    assert [card.parent for card in cards] == [None, "tiny", "tiny", "tiny"]
    assert server.client().models.retrieve("dora").id == "dora"


def test_each_gives_the_text_that_it_gives_alone(server: Any, alone: Alone, prompts: list[str]) -> None:
    for name, prompt in itertools.product(NAMES, prompts):
        assert completed(server, name, prompt) == alone(name, prompt)
    assert len({alone(name, prompts[0]) for name in NAMES}) == len(NAMES)  # else nothing was compared


def test_200_at_once_get_their_own_text_in_shared_steps(server: Any, alone: Alone, prompts: list[str]) -> None:
    wishes = [(NAMES[number % 4], prompts[number // 4 % len(prompts)], 1 + number % 12) for number in range(200)]
    client, before = server.client(timeout=300), server.metric("mixed_steps_total")

    def ask(wish: tuple[str, str, int]) -> str:
        name, prompt, most = wish
        made = client.completions.create(model=name, prompt=prompt, temperature=0, max_tokens=most)
        assert made.model == name
        return str(made.choices[0].text)

    with ThreadPoolExecutor(200) as threads:
        found = list(threads.map(ask, wishes))
    assert found == [alone(*wish) for wish in wishes]
    assert server.metric("mixed_steps_total") > before
    assert server.metric("requests_running") == server.metric("requests_waiting") == 0


def test_a_stream_is_the_answer_in_pieces(server: Any, prompts: list[str]) -> None:
    client = server.client()
    for name in ("plain", "tiny"):
        whole = client.completions.create(model=name, prompt=prompts[0], **GREEDY)
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        pieces = list(client.completions.create(model=name, prompt=prompts[0], **GREEDY, **options))
        assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
        assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert pieces[-1].usage == whole.usage
        assert len(pieces) > 3
        ask = [{"role": "user", "content": "And the king"}]
        said = client.chat.completions.create(model=name, messages=ask, **GREEDY)
        parts = list(client.chat.completions.create(model=name, messages=ask, **GREEDY, **options))
        assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == said.choices[0].message.content
        assert parts[0].choices[0].delta.role == "assistant"
        assert parts[-1].usage == said.usage


def test_a_chat_is_laid_out_by_the_template(server: Any, alone: Alone) -> None:
    messages = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "And"}]},
    ]
    made = server.client().chat.completions.create(model="dora", messages=messages, **GREEDY)
    assert made.choices[0].message.content == alone("dora", "<|system|>Be brief</s><|user|>And</s><|assistant|>")


def test_usage_counts_tokens(server: Any, base_folder: Path, prompts: list[str]) -> None:
    from transformers import AutoTokenizer

    tokens = len(AutoTokenizer.from_pretrained(base_folder)(prompts[0])["input_ids"])
    made = server.client().completions.create(model="plain", prompt=prompts[0], temperature=0, max_tokens=5)
    assert made.usage.prompt_tokens == tokens
    assert made.usage.completion_tokens == 5
    assert made.usage.total_tokens == tokens + 5
    assert made.choices[0].finish_reason == "length"


def test_several_prompts_and_tokens_are_answered_in_order(server: Any, alone: Alone, base_folder: Path) -> None:
    from transformers import AutoTokenizer

    texts = ["And", "the priest", "go thou"]
    ids = [AutoTokenizer.from_pretrained(base_folder)(text)["input_ids"] for text in texts]
    for prompt in (texts, ids):
        made = server.client().completions.create(model="wide", prompt=prompt, **GREEDY)
        assert [choice.index for choice in made.choices] == [0, 1, 2]
        assert [choice.text for choice in made.choices] == [alone("wide", text) for text in texts]
    pieces = list(server.client().completions.create(model="wide", prompt=texts, stream=True, **GREEDY))
    for index, text in enumerate(texts):
        mine = [piece.choices[0].text for piece in pieces if piece.choices[0].index == index]
        assert "".join(mine) == alone("wide", text)


def test_a_stop_ends_the_answer_before_it(server: Any, alone: Alone, prompts: list[str]) -> None:
    text = alone("plain", prompts[0])
    stop = text[3:5]
    expected = text[: text.index(stop)]
    for given in (stop, ["never there", stop]):
        made = server.client().completions.create(model="plain", prompt=prompts[0], stop=given, **GREEDY)
        assert made.choices[0].text == expected
        assert made.choices[0].finish_reason == "stop"
    pieces = server.client().completions.create(model="plain", prompt=prompts[0], stop=stop, stream=True, **GREEDY)
    assert "".join(piece.choices[0].text for piece in pieces) == expected


def test_a_seed_repeats_an_answer_and_another_does_not(server: Any, prompts: list[str]) -> None:
    def sampled(seed: int) -> str:
        return completed(server, "dora", prompts[0], temperature=1.5, seed=seed, top_p=0.9)

    first = sampled(1)
    with ThreadPoolExecutor(6) as threads:
        assert set(threads.map(lambda _: sampled(1), range(6))) == {first}
    assert any(sampled(seed) != first for seed in range(2, 6))


def test_logprobs_are_the_models(server: Any, base_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    ids = tokenizer("And the", return_tensors="pt")["input_ids"]
    made = (
        server.client()
        .completions.create(model="tiny", prompt="And the", temperature=0, max_tokens=1, logprobs=3)
        .choices[0]
    )
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(base_folder)(ids).logits[0, -1].log_softmax(-1).topk(3)
    assert made.logprobs.token_logprobs[0] == pytest.approx(float(theirs.values[0]), abs=1e-5)
    assert sorted(made.logprobs.top_logprobs[0].values(), reverse=True) == pytest.approx(
        theirs.values.tolist(), abs=1e-5
    )
    chat = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "And"}], logprobs=True, top_logprobs=2, **GREEDY
    )
    listed = chat.choices[0].logprobs.content
    assert len(listed) == chat.usage.completion_tokens
    assert all(each.top_logprobs[0].logprob == each.logprob for each in listed)


WRONG: dict[str, tuple[dict[str, Any] | bytes, int, str]] = {
    "unknown model": ({"model": "nobody", "prompt": "a"}, 404, "/v1/models"),
    "no model": ({"prompt": "a"}, 400, "model: Field required"),
    "no prompt": ({"model": "tiny"}, 400, "prompt"),
    "empty prompt": ({"model": "tiny", "prompt": ""}, 400, "empty"),
    "no prompts": ({"model": "tiny", "prompt": []}, 400, "0 prompts"),
    "too many prompts": ({"model": "tiny", "prompt": ["a"] * 9}, 400, "serve.batch"),
    "prompt too long": ({"model": "tiny", "prompt": "king " * 500}, 400, "128"),
    "answer too long": ({"model": "tiny", "prompt": "a", "max_tokens": 513}, 400, "serve.max_tokens=512"),
    "both too long": ({"model": "tiny", "prompt": "a", "max_tokens": 128}, 400, "prompt and answer together"),
    "no tokens": ({"model": "tiny", "prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    "a text for a number": ({"model": "tiny", "prompt": "a", "max_tokens": "5"}, 400, "max_tokens"),
    "too hot": ({"model": "tiny", "prompt": "a", "temperature": 3}, 400, "temperature"),
    "no number": (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "temperature"),
    "top_p 0": ({"model": "tiny", "prompt": "a", "top_p": 0}, 400, "top_p"),
    "unknown token": ({"model": "tiny", "prompt": [1, 10**6]}, 400, "1000000"),
    "negative token": ({"model": "tiny", "prompt": [-1]}, 400, "prompt"),
    "two answers": ({"model": "tiny", "prompt": "a", "n": 2}, 400, "n is not supported"),
    "a penalty": ({"model": "tiny", "prompt": "a", "frequency_penalty": 1.0}, 400, "frequency_penalty"),
    "an unknown field": ({"model": "tiny", "prompt": "a", "tempreature": 0}, 400, "tempreature"),
    "an empty stop": ({"model": "tiny", "prompt": "a", "stop": ""}, 400, "stop"),
    "half a character": (b'{"model": "tiny", "prompt": ["\\ud800"]}', 400, "half of a character"),
    "half a name": (b'{"model": "\\ud800", "prompt": "a"}', 400, "half of a character"),
    "no JSON": (b"{", 400, "not valid JSON"),
    "a list": (b"[]", 400, ""),
    "no UTF-8": (b"\xff\xfe{}", 400, ""),
    "deep": (b"[" * 60_000, 400, ""),
    "a long number": (b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_with_the_reason(server: Any, case: str) -> None:
    body, status, reason = WRONG[case]
    code, answer = server.ask("/v1/completions", body)
    assert code == status
    assert reason in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert server.ask("/health")[0] == 200


CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "messages"),
    "an unknown role": ({"messages": [{"role": "king", "content": "a"}]}, "role"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    "its own words last": ({"messages": [{"role": "assistant", "content": "a"}]}, "last message"),
    "top without logprobs": ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "logprobs=true"),
    "tools": ({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, "tools"),
}


@pytest.mark.parametrize("case", CHATS)
def test_a_wrong_chat_is_refused_with_the_reason(server: Any, case: str) -> None:
    body, reason = CHATS[case]
    code, answer = server.ask("/v1/chat/completions", {"model": "tiny", **body})
    assert code == 400
    assert reason in answer["error"]["message"]


def test_a_client_gets_its_own_exceptions(server: Any) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError, match="/v1/models"):
        completed(server, "nobody", "a")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        completed(server, "tiny", "a", temperature=9)


def test_pages_that_are_not_there_and_ways_that_are_not_open(server: Any) -> None:
    assert server.ask("/v1/nothing")[0] == 404
    assert server.ask("/v1/completions")[0] == 405
    assert server.ask("/docs")[0] == 404
    status, answer = server.ask("/v1/completions", b"{}", {"Content-Type": "text/plain"})
    assert status == 415
    assert "application/json" in answer["error"]["message"]


def test_a_body_that_is_too_large_is_not_read(server: Any) -> None:
    for size in (70_000, 5_000_000):
        status, answer = server.ask("/v1/completions", {"model": "tiny", "prompt": "a" * size})
        assert status == 413
        assert "serve.max_body_kb=64" in answer["error"]["message"]


def test_a_body_of_unsaid_length_is_counted(server: Any) -> None:
    import http.client

    connection = http.client.HTTPConnection(server.url.split("/")[2], timeout=30)
    parts = (b"x" * 10_000 for _ in range(20))
    connection.request("POST", "/v1/completions", parts, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_foreign_pages_and_names_are_kept_out(server: Any) -> None:
    body = {"model": "tiny", "prompt": "a"}
    for headers in (
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost@evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ):
        status, answer = server.ask("/v1/completions", body, headers)
        assert status == 403, headers
        assert answer["error"]["type"] == "permission_error"
    for headers in ({"Host": "localhost:8000"}, {"Host": "[::1]:80"}, {"Origin": "http://localhost:3000"}):
        assert server.ask("/v1/completions", body, headers)[0] == 200, headers


def test_a_client_that_goes_is_written_for_no_longer(server: Any) -> None:
    options: Any = {"model": "plain", "prompt": ["And"] * 8, "max_tokens": 100, "logprobs": 5}
    before = server.metric("cancelled_total")
    stream = server.client().completions.create(stream=True, **options)
    next(iter(stream))
    stream.close()
    assert server.wait_for(lambda: server.metric("cancelled_total") > before)
    before = server.metric("cancelled_total")
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=0.05).completions.create(**options)
    assert server.wait_for(lambda: server.metric("cancelled_total") > before)
    assert server.wait_for(lambda: server.metric("requests_running") == 0)


def test_no_secret_and_no_prompt_is_in_what_it_says(server: Any) -> None:
    completed(server, "tiny", "a most private prompt")
    server.ask("/v1/completions", b"{private", {"Authorization": "Bearer sk-very-private"})
    assert "sk-secret" not in server.said
    assert "private" not in server.said
    assert "Traceback" not in server.said


# Adapters that come and go


def loads(server: Any, name: str, path: str | Path) -> tuple[int, Any]:
    found: tuple[int, Any] = server.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
    return found


def unloads(server: Any, name: str) -> tuple[int, Any]:
    found: tuple[int, Any] = server.ask("/v1/unload_lora_adapter", {"lora_name": name})
    return found


@pytest.fixture(scope="module")
def growing(start: Callable[..., Any], adapter_folders: dict[str, Path]) -> Any:
    """A server that began with the base alone, and may take two adapters from the folder of all."""
    return start(f"serve.folder={adapter_folders['plain'].parent}", "serve.adapters=2")


def test_adapters_are_loaded_and_unloaded(growing: Any, alone: Alone, adapter_folders: dict[str, Path]) -> None:
    assert [card.id for card in growing.client().models.list().data] == ["tiny"]
    assert completed(growing, "tiny", "And") == alone("tiny", "And")
    for name in ("dora", "wide"):
        status, said = loads(growing, name, adapter_folders[name])
        assert status == 200, said
        assert said == f"Success: LoRA adapter '{name}' added successfully."
        assert completed(growing, name, "And") == alone(name, "And")
    status, said = loads(growing, "plain", adapter_folders["plain"])
    assert status == 400
    assert "serve.adapters=2" in said["error"]["message"]
    for name in ("dora", "wide"):
        assert unloads(growing, name) == (200, f"Success: LoRA adapter '{name}' removed successfully.")
        assert growing.ask("/v1/completions", {"model": name, "prompt": "And"})[0] == 404
    assert completed(growing, "tiny", "And") == alone("tiny", "And")


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(
    growing: Any, alone: Alone, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    root = adapter_folders["plain"].parent
    outside = tmp_path / "outside"
    outside.mkdir()
    for file in adapter_folders["plain"].iterdir():
        (outside / file.name).write_bytes(file.read_bytes())
    (root / "link").symlink_to(outside)
    (root / "half").mkdir()
    (root / "half/adapter_config.json").write_bytes((outside / "adapter_config.json").read_bytes())
    (root / "half/adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (root / "pickled").mkdir()
    (root / "pickled/adapter_config.json").write_bytes((outside / "adapter_config.json").read_bytes())
    (root / "pickled/adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (root / "broken").mkdir()
    (root / "broken/adapter_config.json").write_bytes((outside / "adapter_config.json").read_bytes())
    (root / "broken/adapter_model.safetensors").write_bytes(b"not tensors at all")
    shutil.copytree(outside, root / "other/adapter")
    (root / "other/config.yaml").write_text("{model: {label: another}, adapter: {}}")
    cases = {
        root / "other": "was trained on another, and the base here is tiny",
        outside: "not below serve.folder",
        root / "../outside": "not below serve.folder",
        root / "link": "not below serve.folder",
        root / "half": "is a link to a place that is not below",
        root / "pickled": "no adapter_model.safetensors",
        root / "broken": "cannot be read",
        root / "nothing": "is no folder",
        "/etc": "not below serve.folder",
        "\0": "lora_path",
        "best": "not below serve.folder",
    }
    for path, reason in cases.items():
        status, said = loads(growing, "new", path)
        assert status == 400, (path, said)
        assert reason in said["error"]["message"], path
    plain = adapter_folders["plain"]
    for name in ("tiny", "a b", "", "x" * 300, "../x\n"):
        assert loads(growing, name, plain)[0] == 400, name
    assert loads(growing, "plain", plain)[0] == 200
    status, said = loads(growing, "plain", plain)
    assert status == 400
    assert "already been loaded" in said["error"]["message"]
    assert unloads(growing, "plain")[0] == 200
    assert unloads(growing, "plain")[0] == 404
    assert [card.id for card in growing.client().models.list().data] == ["tiny"]
    assert completed(growing, "tiny", "And") == alone("tiny", "And")
    assert "Traceback" not in growing.said


def test_loading_and_unloading_under_load_never_mixes_texts(
    growing: Any, alone: Alone, adapter_folders: dict[str, Path], prompts: list[str]
) -> None:
    """The same name means one adapter after another; an answer is one of theirs in whole, or an error."""
    openai = pytest.importorskip("openai")
    ended, found = threading.Event(), []
    client = growing.client(timeout=120)

    def ask(number: int) -> None:
        prompt = prompts[number % len(prompts)]
        while not ended.is_set():
            for name in ("changing", "tiny"):
                try:
                    made = client.completions.create(model=name, prompt=prompt, temperature=0, max_tokens=12)
                    found.append((name, prompt, made.choices[0].text))
                except openai.NotFoundError as error:
                    found.append((name, prompt, str(error.code)))

    def answered() -> int:
        return sum(name == "changing" and text != "model_not_found" for name, _, text in list(found))

    for each, prompt in itertools.product(("plain", "dora", "tiny"), prompts):
        alone(each, prompt)  # before the others want the processor
    with ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(ask, number) for number in range(8)]
        for turn in range(8):
            assert loads(growing, "changing", adapter_folders[("plain", "dora")[turn % 2]])[0] == 200
            had = answered()
            assert growing.wait_for(lambda: answered() > had + 3)  # noqa: B023
            assert unloads(growing, "changing")[0] == 200
        ended.set()
        for each in asking:
            each.result()
    for name, prompt, text in found:
        whose = ("plain", "dora") if name == "changing" else ("tiny",)
        allowed = {alone(each, prompt) for each in whose} | ({"model_not_found"} if name == "changing" else set())
        assert text in allowed
    assert ("changing", "model_not_found") in {(name, text) for name, _, text in found}


def test_a_stream_of_an_unloaded_adapter_ends_with_an_error(growing: Any, adapter_folders: dict[str, Path]) -> None:
    openai = pytest.importorskip("openai")
    assert loads(growing, "short", adapter_folders["plain"])[0] == 200
    crowd = [
        growing.client().completions.create(
            model="short", prompt="And", stream=True, temperature=1.0, seed=seed, max_tokens=110, logprobs=5
        )
        for seed in range(8)
    ]
    assert unloads(growing, "short")[0] == 200
    ends = []
    for stream in crowd:
        try:
            ends.append([piece.choices[0].finish_reason for piece in stream][-1])
        except openai.APIError as error:
            ends.append(str(error))
    assert any("unloaded" in str(end) for end in ends)
    assert all(end in ("stop", "length") or "unloaded" in end for end in ends)


# The end


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_without_a_traceback(
    start: Callable[..., Any], adapter_folders: dict[str, Path], number: int, code: int
) -> None:
    server = start(f"run={adapter_folders['plain']}", "serve.names=[plain]")
    stream = server.client().completions.create(model="plain", prompt="And", stream=True, temperature=0, max_tokens=60)
    first = next(iter(stream))
    assert server.end(number) == code
    text = first.choices[0].text + "".join(piece.choices[0].text for piece in stream)
    assert text  # what ran had its time to end
    assert server.wait_for(lambda: "Interrupted" in server.said)
    assert "Traceback" not in server.said


def test_what_takes_longer_than_its_grace_is_cut_off_and_says_so(
    start: Callable[..., Any], adapter_folders: dict[str, Path]
) -> None:
    openai = pytest.importorskip("openai")
    server = start(f"run={adapter_folders['wide']}", "serve.names=[wide]", "serve.grace_s=0")
    streams = [
        server.client().completions.create(model="wide", prompt="And", stream=True, temperature=1.0, max_tokens=120)
        for _ in range(6)
    ]
    assert server.end(signal.SIGTERM) == 143
    ends = []
    for stream in streams:
        try:
            ends.append([piece.choices[0].finish_reason for piece in stream][-1])
        except openai.APIError as error:
            ends.append(str(error))
    assert all(end in ("stop", "length") or "shutting down" in end for end in ends)
    assert "Traceback" not in server.said


def test_more_than_may_wait_are_told_to_come_again(
    start: Callable[..., Any], adapter_folders: dict[str, Path], alone: Alone
) -> None:
    openai = pytest.importorskip("openai")
    server = start(f"run={adapter_folders['plain']}", "serve.names=[plain]", "serve.batch=1", "serve.queue=1")
    client = server.client(timeout=120)

    def ask(_: int) -> str:
        try:
            return str(
                client.completions.create(model="plain", prompt="And", temperature=0, max_tokens=40).choices[0].text
            )
        except openai.RateLimitError as error:
            return f"again in {error.response.headers['retry-after']} s"

    with ThreadPoolExecutor(24) as threads:
        found = list(threads.map(ask, range(24)))
    assert set(found) == {"again in 1 s", alone("plain", "And", 40)}


def test_the_first_runs_are_named_by_their_folders(start: Callable[..., Any], adapter_folders: dict[str, Path]) -> None:
    server = start(f"run={adapter_folders['plain']}")
    names = [card.id for card in server.client().models.list().data]
    assert len(names) == 2
    assert names[1].endswith("plain")


def test_beyond_this_machine_is_said_and_a_second_signal_waits_for_nothing(
    start: Callable[..., Any], adapter_folders: dict[str, Path]
) -> None:
    server = start(f"run={adapter_folders['plain']}", "serve.names=[plain]", "serve.host=0.0.0.0", "serve.grace_s=600")
    assert "there is no login" in server.said
    assert server.ask("/v1/models", headers={"Host": "my-machine.example"})[0] == 200
    host, port = server.url.split("/")[2].split(":")
    with socket.create_connection((host, int(port))) as slow:  # whose body does not come
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(1.5)
        assert server.end(signal.SIGTERM, 10) == 143
    assert "Traceback" not in server.said


def test_a_quantised_base_is_shared_as_well(start: Callable[..., Any], adapter_folders: dict[str, Path]) -> None:
    pytest.importorskip("bitsandbytes")
    folders = [adapter_folders[name] for name in ("plain", "dora")]
    server = start(f"run=[{folders[0]},{folders[1]}]", "serve.names=[plain,dora]", "quantization=int8")
    names = ["plain", "dora", "tiny"]
    one_by_one = {name: completed(server, name, "And the king") for name in names}
    before = server.metric("mixed_steps_total")
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda name: completed(server, name, "And the king"), names * 2))
    assert together == [one_by_one[name] for name in names * 2]
    assert server.metric("mixed_steps_total") > before
    assert len(set(one_by_one.values())) == 3
