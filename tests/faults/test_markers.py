"""Marked secrets go in wherever a user may put one, and are looked for in all that comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Forked = Callable[..., Any]
MARK = "Zq7markedSecret"


def found_in(done: Any) -> list[str]:
    """Every place that holds the mark: files, terminal, database."""
    places = [path for path in done.folder.rglob("*") if path.is_file() and MARK.encode() in path.read_bytes()]
    return [str(path.relative_to(done.folder)) for path in places]


REFUSED = [
    [f"tracking.uri=http://user:{MARK}@host"],
    [f"tracking.uri=https://{MARK}@host", "rank=2,4", "-m"],
    [f"tracking.uri='http://host/?token={MARK}'"],
    [f"data.path=http://user:{MARK}@host/x"],
    [f"model.path=https://host/x?api_key={MARK}"],
    [f"model.name=https://{MARK}@host/org/name"],
    [f"+hydra.job.env_set.MLFLOW_TRACKING_PASSWORD={MARK}"],
    [f"tracking.uri=http://user:{MARK}@host", "--cfg", "job"],
]


@pytest.mark.parametrize("arguments", REFUSED, ids=range(len(REFUSED)))
def test_on_the_command_line_it_is_refused_before_anything_is_written(
    arguments: list[str], forked: Forked, tiny_overrides: list[str]
) -> None:
    done = forked(*tiny_overrides, *arguments)
    assert done.code == 1
    assert "holds a login or a token" in done.err
    assert found_in(done) == []
    assert {path.name for path in done.folder.rglob("*")} == {"outputs", "mlflow.db", "out", "err"}


@pytest.mark.parametrize("multirun", [[], ["rank=2,4", "-m"]])
def test_in_a_file_of_the_users_it_is_refused_and_not_copied(
    multirun: list[str], forked: Forked, tiny_overrides: list[str], workplace: Path
) -> None:
    mine = workplace / "mine/experiment"
    mine.mkdir(parents=True)
    (mine / "a.yaml").write_text(f"# @package _global_\ntracking: {{uri: 'http://user:{MARK}@host'}}\n")
    done = forked("--config-dir", str(mine.parent), "+experiment=a", *tiny_overrides, *multirun)
    assert done.code == 1
    assert "tracking.uri holds a login" in done.err
    assert found_in(done) == []


@pytest.mark.parametrize(
    ("login", "environment"),
    [
        (f"user:{MARK}", {"MLFLOW_TRACKING_URI": f"http://user:{MARK}@127.0.0.1:PORT"}),
        (f"{MARK}:", {"MLFLOW_TRACKING_URI": f"http://{MARK}@127.0.0.1:PORT"}),
        (
            f"user:{MARK}",
            {
                "MLFLOW_TRACKING_URI": "http://127.0.0.1:PORT",
                "MLFLOW_TRACKING_USERNAME": "user",
                "MLFLOW_TRACKING_PASSWORD": MARK,
            },
        ),
    ],
    ids=["user and password", "token alone", "variables"],
)
@pytest.mark.parametrize("is_right", [True, False])
def test_from_the_environment_it_works_and_is_nowhere_to_be_seen(
    login: str, environment: dict[str, str], is_right: bool, forked: Forked, fake_server: Callable[..., Any],
    tiny_overrides: list[str],
) -> None:  # fmt: skip
    server = fake_server(login=login if is_right else "another:login")
    environment = {name: value.replace("PORT", str(server.port)) for name, value in environment.items()}
    full = {} if is_right else {"HYDRA_FULL_ERROR": "1"}  # whole tracebacks
    done = forked(*tiny_overrides, environment={**environment, **full, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})
    assert found_in(done) == []
    assert MARK not in str(server.requests)
    if is_right:
        assert done.code == 0, done.err
        assert server.statuses() == ["FINISHED"]
        assert not any(MARK.encode() in path.read_bytes() for path in server.folder.rglob("*") if path.is_file())
    else:
        assert done.code == 1
        assert server.refused


def test_a_query_in_the_environments_address_is_refused_unseen(forked: Forked, tiny_overrides: list[str]) -> None:
    done = forked(*tiny_overrides, environment={"MLFLOW_TRACKING_URI": f"http://127.0.0.1:9/?token={MARK}"})
    assert done.code == 1
    assert "MLFLOW_TRACKING_TOKEN" in done.err
    assert found_in(done) == []


def test_a_secret_that_is_a_part_of_a_path_is_no_parameter(
    forked: Forked, tiny_overrides: list[str], workplace: Path
) -> None:
    folder = workplace / MARK
    folder.mkdir()
    text = next(override for override in tiny_overrides if override.startswith("data.path=")).removeprefix("data.path=")
    (folder / "text.txt").write_text(Path(text).read_text())
    (workplace / "work").mkdir()
    done = forked(*tiny_overrides, "data.path=${oc.env:MY_FILE}", folder=workplace / "work",
                  environment={"MY_FILE": f"{folder}/text.txt", "HF_TOKEN": MARK})  # fmt: skip
    assert done.code == 0, done.err
    assert found_in(done) == []


@pytest.mark.parametrize("fails", [False, True], ids=["finished", "failed"])
def test_no_byte_of_a_run_holds_any_secret(
    fails: bool, forked: Forked, fake_server: Callable[..., Any], tiny_overrides: list[str]
) -> None:
    """Not its folder, not the store, not the artifacts: with every secret set, and one pointed to."""
    names = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")
    server = fake_server(login=f"user:{MARK}", trouble=lambda call, number: "500" if number > 10 else None)
    secrets = {name: f"{MARK}-{name}" for name in names[:1] + names[2:]}
    environment = {**secrets, "MLFLOW_TRACKING_URI": f"http://user:{MARK}@127.0.0.1:{server.port}"}
    broken = {"target": "lora_exp.training.loop:_accumulate", "at": 3, "do": "raise", "message": f"{MARK}-HF_TOKEN"}
    done = forked(*tiny_overrides, "tracking.run_name='${oc.env:HF_TOKEN}'", "hydra.run.dir=outputs/job",
                  environment=environment, **(broken if fails else {}))  # fmt: skip
    assert done.code == int(fails), done.err
    assert found_in(done) == []
    assert MARK not in str(server.requests)
    assert list(done.folder.glob("outputs/job/tracking/*.jsonl"))  # undelivered, so looked through, too
    stored = [path for path in server.folder.rglob("*") if path.is_file()]
    assert not [path for path in stored if MARK.encode() in path.read_bytes()]
