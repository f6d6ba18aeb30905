from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from steer.anatomy.headers import read_headers
from steer.anatomy.packed import shapes_of
from steer.anatomy.resolve import resolve
from steer.backends.vllm.config import Declared
from steer.backends.vllm.server import places
from steer.backends.vllm.server.front import Front, Started
from steer.backends.vllm.server.run import MIDDLEWARE, OURS, Options, Plan, plan
from steer.cli import app
from steer.loading import tokenizer_of
from steer.model import load
from steer.sources import locate
from tests.steer.backends.vllm.server.serving import adapter, adding, anatomy
from tests.steer.made import refused


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "s").mkdir()
    adding(0).save(tmp_path / "s" / "calm.yaml")
    return tmp_path / "s"


def planned(folder: Path | None, model: str = "organism:chain", **given: Any) -> Plan:
    return plan(Options(model, folder, **given))


def value(made: Plan, flag: str) -> str:
    words = made.arguments
    assert words.count(flag) == 1, flag
    return words[words.index(flag) + 1]


def test_vllm_is_told_where_to_listen_what_to_steer_and_who_stands_in_front(folder: Path) -> None:
    made = planned(folder, port=1234, max_num_seqs=7, tensor=2, rest=("--dtype", "float32"))
    assert made.arguments[0] == "serve" and Path(made.arguments[1]).is_dir()
    assert value(made, "--host") == "127.0.0.1" and value(made, "--port") == "1234"
    assert value(made, "--served-model-name") == "organism:chain" and value(made, "--middleware") == MIDDLEWARE
    assert value(made, "--max-num-seqs") == "7" and value(made, "--shutdown-timeout") == "30"
    assert value(made, "--tensor-parallel-size") == "2" and "--pipeline-parallel-size" not in made.arguments
    assert value(made, "--dtype") == "float32" and "--enable-lora" not in made.arguments
    declared = Declared.from_config(json.loads(value(made, "--additional-config")))
    assert declared is not None and declared.slots == 7
    assert declared.places == (("resid_post", "add", 1),) and declared.marks == load("organism:chain").marks
    marks = json.loads(value(made, "--reasoning-config"))
    assert marks == {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
    assert "--reasoning-config" not in planned(folder, rest=("--reasoning-parser", "x")).arguments
    assert made.command[1:3] == ("-m", "steer.backends.vllm.server.launch")


def test_weights_of_float32_stay_so_unless_something_else_is_said(folder: Path) -> None:
    assert value(planned(folder), "--dtype") == "float32"
    assert value(planned(folder, rest=("--dtype", "bfloat16")), "--dtype") == "bfloat16"
    assert "--dtype" not in planned(folder, rest=("--dtype=bfloat16",)).arguments


def test_every_api_server_is_told_the_same(folder: Path, tmp_path: Path) -> None:
    made = planned(folder, flags={"coefficients": [0.0, 1.0]})
    again = Started(**json.loads(made.started.to_text()))
    assert Front(again).listing(None) == made.front.listing(None)
    assert Front(again).settings().coefficients == (0, 1)


def test_the_heads_of_an_organism_are_made_wide_enough_once(folder: Path) -> None:
    wide = Path(planned(folder).arguments[1])
    before = {path.name: path.stat().st_mtime_ns for path in wide.iterdir()}
    assert read_headers(wide).config["head_dim"] == 32
    assert planned(folder).arguments[1] == str(wide)
    assert {path.name: path.stat().st_mtime_ns for path in wide.iterdir()} == before
    steering = load("organism:chain").identity
    assert planned(folder).front.started.model == str(locate("organism:chain").folder), steering


def test_adapters_are_handed_to_vllm_with_room_for_the_largest(folder: Path, tmp_path: Path) -> None:
    wide = planned(folder).arguments[1]
    adapter(folder / "small", rank=3)
    refused(lambda: planned(folder), "'small'", "width")
    adapter(folder / "large", rank=20)
    made = planned(folder, wide)
    assert value(made, "--max-lora-rank") == "32" and value(made, "--max-loras") == "3", "an empty place is the last"
    start = made.arguments.index("--lora-modules")
    modules = [json.loads(text) for text in made.arguments[start + 1 : start + 3]]
    assert {row["name"]: row["path"] for row in modules} == {name: str(folder / name) for name in ("large", "small")}
    assert set(made.started.adapters) == {"large", "small"}
    (folder / "small" / "adapter_config.json").write_text("[]")
    refused(lambda: planned(folder, wide), "rank")
    adapter(folder / "huge", rank=4096)
    (folder / "small" / "adapter_config.json").write_text('{"r": 1}')
    refused(lambda: planned(folder, wide), "4096", "512")


@pytest.mark.parametrize("flag", sorted(OURS))
def test_what_steer_serve_decides_is_not_taken_from_the_rest(flag: str, folder: Path) -> None:
    for words in ((flag, "x"), (f"{flag}=x",), (flag.replace("-", "_").replace("__", "--"), "x")):
        refused(lambda words=words: planned(folder, rest=words), flag)


@pytest.mark.parametrize("words", [("--additional-config.steering.slots=3",), ("--additional_config.a", "1"), ("--lora-mod", "x"), ("--api_k=x",)])  # fmt: skip
def test_other_ways_of_vllm_to_say_the_same_are_not_taken_either(words: tuple[str, ...], folder: Path) -> None:
    refused(lambda: planned(folder, rest=words), "among the arguments")


def test_arguments_that_begin_like_ours_are_handed_on(folder: Path) -> None:
    assert planned(folder, rest=("--config-format", "hf")).arguments[-6:-4] == ("--config-format", "hf")


def test_a_front_end_without_middleware_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    refused(lambda: planned(folder), "VLLM_USE_RUST_FRONTEND")


def test_what_does_not_fit_is_listed_and_does_not_keep_the_server_from_starting(folder: Path) -> None:
    adding(0, (99,)).save(folder / "deep.yaml")
    (folder / "broken.yaml").write_text("{")
    rows = {row["name"]: row["problem"] for row in planned(folder).front.listing(None)["steerings"]}
    assert rows["calm"] is None and "layer 99" in rows["deep"] and "YAML" in rows["broken"]


def test_a_server_that_could_serve_nobody_is_not_started(folder: Path, tmp_path: Path) -> None:
    refused(lambda: planned(folder, flags={"default": {"steering": "gone"}}), "gone")
    refused(lambda: planned(tmp_path / "none"), "no folder")
    (tmp_path / "settings.yaml").write_text("{keys: [{env: NOT_SET_ANYWHERE}]}")
    refused(lambda: planned(folder, settings=tmp_path / "settings.yaml"), "NOT_SET_ANYWHERE")


def test_places_are_those_of_the_folder_and_those_that_were_declared(folder: Path) -> None:
    declared = planned(folder, declare=("mlp_out:0,2-3", "resid_pre")).front.declared.places
    hidden = {(site, kind) for site, kind, _ in declared}
    assert ("resid_post", "add", 1) in declared and ("mlp_out", "project") in hidden
    assert {layer for site, _, layer in declared if site == "mlp_out"} == {0, 2, 3}
    assert {layer for site, _, layer in declared if site == "resid_pre"} == {0}
    everything = places.declared(["all"], anatomy())
    assert len(everything) == 2 * (3 * anatomy().layers + 1), "a dense model has no routers"
    moe = read_headers(locate("organism:chain-moe").folder)
    experts = resolve(moe.config, shapes_of(moe.config, moe.shapes))
    assert {place[:2] for place in places.declared(["router"], experts)} == {("router", "scale")}


@pytest.mark.parametrize(
    "text", ["z", "resid_post:", "resid_post:6", "resid_post:3-1", "resid_post:x", "router", "ALL", "resid_pre:1"]
)
def test_places_that_are_not_there_are_refused(text: str) -> None:
    if text == "resid_post:":
        assert places.declared([text], anatomy()) == places.declared(["resid_post"], anatomy())
        return
    refused(lambda: places.declared([text], anatomy()), text)


def test_endings_are_what_the_template_appends_with_thinking_on_and_off() -> None:
    tokenizer = tokenizer_of("organism:chain")
    model = load("organism:chain")
    question = [{"role": "user", "content": "hey a = 3 ; b = a + 4 ; ? b"}]
    found = places.endings(tokenizer)
    for thinking in (None, True, False):
        rendered = model.render(question, thinking=thinking)
        assert rendered.token_ids[rendered.generation_prompt_start :] in found
    tokenizer.chat_template = None
    assert places.endings(tokenizer) == () == places.endings(None)


def test_the_verb_tells_what_it_would_start(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"limits": {"calm": [0.0, 2.0]}}))
    words = ["serve", "organism:chain", "--steerings", str(folder), "--settings", str(tmp_path / "settings.yaml")]
    words += ["--default", "calm@0.5", "--coefficients", "-1", "1", "--dry-run", "--json", "--", "--dtype", "float32"]
    assert app.run(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["default"] == {"steering": "calm", "coefficient": 0.5, "phase": None}
    assert said["steerings"][0]["coefficients"] == [0.0, 2.0] and said["command"][-2:] == ["--middleware", MIDDLEWARE]
    assert "float32" in said["command"]
    assert app.run(["serve", "organism:chain", "--default", "calm@x", "--dry-run"]) == 2
    assert app.run(["serve", "organism:chain", "--off", "--dry-run", "--default", "gone"]) == 0


def test_without_vllm_it_is_said_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.backends.vllm.start.find_spec", lambda name: None)
    refused(planned(folder).become, "reasoning-steer[vllm]")


def test_a_port_that_is_taken_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("steer.backends.vllm.start.find_spec", lambda name: True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert app.run(["serve", "organism:chain", "--port", str(taken.getsockname()[1])]) == 2
    assert "nothing can listen" in capsys.readouterr().err.lower()


def test_it_becomes_vllm_with_the_same_environment_and_one_variable_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[Any] = []
    monkeypatch.setattr("steer.backends.vllm.start.find_spec", lambda name: True)
    monkeypatch.setattr("os.execve", lambda *given: became.append(given))
    monkeypatch.setenv("A_KEY", "s3cret")
    made = planned(folder)
    made.become()
    program, words, environment = became[0]
    assert program == words[0] and words == made.command and environment["A_KEY"] == "s3cret"
    assert json.loads(environment["STEER_SERVER"])["steerings"] == str(folder)
    assert "s3cret" not in environment["STEER_SERVER"]
