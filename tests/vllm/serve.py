"""One server and its clients: `.venv-vllm/bin/python tests/vllm/serve.py JOB.json RESULT.json`. Imports nothing of ours.

Starts `steer serve` as a job says, asks it with the `openai` client what tests want to know, changes files under it, loads
it, and ends it with SIGTERM while replies are being written. What was seen is the result; tests judge it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

READY = 480
"""Seconds until the server has to be there; the machine may be busy."""


class Session:
    """The server's process, and a client of it."""

    def __init__(self, job: Mapping[str, Any], log: Path) -> None:
        self.job, self.folder = job, Path(job["folder"])
        self.url = f"http://127.0.0.1:{job['port']}"
        self.said = log.open("w")
        self.process = subprocess.Popen(
            job["command"], stdout=self.said, stderr=self.said, env={**os.environ, **job["environment"]}
        )
        self.client = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=job["keys"]["all"], max_retries=0, timeout=300
        )
        self.plain = httpx.Client(
            base_url=self.url, timeout=60, headers={"authorization": f"Bearer {job['keys']['all']}"}
        )

    def wait(self) -> float:
        """Wait until the server is healthy; return the seconds that it took."""
        began = time.monotonic()
        while time.monotonic() - began < READY and self.process.poll() is None:
            try:
                if self.plain.get("/health").status_code == 200:
                    return time.monotonic() - began
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"the server is not there; it ended with {self.process.poll()}")

    def words(self, ask: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the client of `openai` is called with."""
        more = {"vllm_xargs": ask["words"], "ignore_eos": True, "return_token_ids": True, **ask.get("more", {})}
        given: dict[str, Any] = {"model": self.job["model"], "temperature": 0, "max_tokens": ask["tokens"]}
        if ask["chat"]:
            content = {"messages": [{"role": "user", "content": ask["content"]}], "logprobs": True}
        else:
            content = {"prompt": ask["content"], "logprobs": 0}
        return {**given, **content, "extra_body": more}

    def endpoint(self, ask: Mapping[str, Any], client: openai.AsyncOpenAI | None = None) -> Any:
        """Return the resource of the client that an ask goes to."""
        client = client or self.client
        return client.chat.completions if ask["chat"] else client.completions

    async def answer(self, ask: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
        """Ask once; what is refused is an answer, too."""
        client = self.client if key is None else self.client.with_options(api_key=key)
        try:
            raw = await self.endpoint(ask, client).with_raw_response.create(**self.words(ask))
        except openai.APIStatusError as error:
            return {"status": error.status_code, "error": str(error)}
        reply = raw.parse()
        choice = reply.choices[0]
        if ask["chat"]:
            text, logprobs = choice.message.content, [token.logprob for token in choice.logprobs.content]
        else:
            text, logprobs = choice.text, choice.logprobs.token_logprobs
        headers = {name: value for name, value in raw.headers.items() if name.startswith("x-steering")}
        return {
            "status": raw.status_code, "text": text, "logprobs": logprobs, "tokens": choice.token_ids, "headers": headers,
            "steering": reply.steering, "prompt": choice.prompt_token_ids if hasattr(choice, "prompt_token_ids") else reply.prompt_token_ids,
        }  # fmt: skip

    async def stream(self, ask: Mapping[str, Any], after: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
        """Ask for a stream, read it to its end, and call `after` with the number of pieces that have come."""
        text, count = "", 0
        words = {**self.words(ask), "stream": True}
        async with self.endpoint(ask).with_streaming_response.create(**words) as raw:
            headers = {name: value for name, value in raw.headers.items() if name.startswith("x-steering")}
            async for piece in await raw.parse():
                choice = piece.choices[0] if piece.choices else None
                text += "" if choice is None else (choice.delta.content if ask["chat"] else choice.text) or ""
                count += 1
                after(count)
        return {"text": text, "headers": headers, "pieces": count}

    def put(self, name: str, spare: str) -> None:
        """Let another steering lie under a name, in the way in which files are exchanged: by renaming."""
        for suffix in (".safetensors", ".yaml"):
            shutil.copyfile(Path(self.job["spare"]) / f"{spare}{suffix}", self.folder / f".{name}{suffix}")
            (self.folder / f".{name}{suffix}").rename(self.folder / f"{name}{suffix}")

    def counters(self) -> dict[str, float]:
        """Return what `/metrics` says of steerings and of running requests."""
        rows = [
            line.rsplit(" ", 1) for line in self.plain.get("/metrics").text.splitlines() if not line.startswith("#")
        ]
        return {
            name: float(value) for name, value in rows if name.startswith(("steer_requests_total", "vllm:num_requests"))
        }

    def memory(self) -> dict[str, int]:
        """Bytes that each of the server's processes has for itself, by its number."""
        tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return {f"{process.pid} {process.name()}": process.memory_full_info().uss for process in tree}


async def alone(session: Session) -> dict[str, Any]:
    """Every ask by itself: the whole reply, and again as a stream."""
    asks = session.job["asks"]
    whole, streamed = [await session.answer(ask) for ask in asks], [await session.stream(ask) for ask in asks]
    others = {name: await session.answer(ask) for name, ask in session.job["others"].items()}
    return {"whole": whole, "streamed": streamed, "others": others}


async def refusals(session: Session) -> dict[str, Any]:
    """What is not served, and who may ask for what."""
    ask = session.job["asks"][0]
    found = {name: await session.answer({**ask, **change}) for name, change in session.job["refused"].items()}
    for name, key in (("team", session.job["keys"]["team"]), ("nobody", "wrong")):
        for steering in session.job["allowed"]:
            found[f"{name}: {steering}"] = await session.answer({**ask, "words": {"steering": steering}}, key)
    raw = {
        name: session.plain.post(path, content=bytes.fromhex(data)).status_code
        for name, (path, data) in session.job["malformed"].items()
    }
    listed = session.plain.get("/steerings").json()
    hidden = httpx.get(f"{session.url}/steerings", headers={"authorization": f"Bearer {session.job['keys']['team']}"})
    health = httpx.get(f"{session.url}/health").status_code
    after = await session.answer(ask)
    return {"asked": found, "malformed": raw, "listed": listed, "team": hidden.json(), "health": health, "after": after}


async def changes(session: Session) -> dict[str, Any]:
    """A file changes under a running reply; one breaks; steering is turned off and on."""
    ask = session.job["changing"]
    name = ask["words"]["steering"]
    found: dict[str, Any] = {"before": await session.answer(ask)}
    found["running"] = await session.stream(ask, lambda count: session.put(name, "other") if count == 3 else None)
    found["after"] = await session.answer(ask)
    (session.folder / f"{name}.yaml").write_text("{")
    found["broken"] = await session.answer(ask)
    session.put(name, "first")
    found["back"] = await session.answer(ask)
    settings = Path(session.job["settings"])
    kept = settings.read_text()
    settings.write_text(f"{kept}\nenabled: false\n")
    found["off"] = await session.answer(ask)
    settings.write_text(kept)
    found["on"] = await session.answer(ask)
    return found


async def leaving(session: Session) -> dict[str, Any]:
    """Clients that go away in the middle of a stream, and of a body."""
    ask = {**session.job["changing"], "tokens": 200}
    for _ in range(4):
        async with session.endpoint(ask).with_streaming_response.create(**session.words(ask), stream=True) as raw:
            async for _piece in await raw.parse():
                break
    with socket.create_connection(("127.0.0.1", session.job["port"])) as half:
        key = session.job["keys"]["all"]
        half.sendall(
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: 99\r\n\r\n{{".encode()
        )
    for _ in range(100):
        counters = session.counters()
        running = sum(value for name, value in counters.items() if name.startswith("vllm:num_requests_running"))
        if running == 0:
            break
        await asyncio.sleep(0.1)
    return {"running": running, "after": await session.answer(session.job["changing"])}


async def load(session: Session) -> dict[str, Any]:
    """Clients in parallel, each asking one thing after another, for so many seconds."""
    asks, seconds = session.job["asks"], session.job["seconds"]
    began, told, wrong, memory = time.monotonic(), [0] * len(asks), [], []
    expected = [(await session.answer(ask)) for ask in asks]

    async def client(number: int) -> None:
        turn = number
        while time.monotonic() - began < seconds:
            which = turn % len(asks)
            turn += 7
            if turn % 3:
                reply = await session.answer(asks[which])
                seen, known = reply.get("tokens"), expected[which]["tokens"]
            else:
                reply = await session.stream(asks[which])
                seen, known = reply["text"], expected[which]["text"]
            if seen != known or reply["headers"] != expected[which]["headers"]:
                wrong.append({"ask": asks[which], "expected": known, "reply": reply})
            told[which] += 1

    async def watch() -> None:
        while time.monotonic() - began < seconds:
            memory.append((time.monotonic() - began, await asyncio.to_thread(session.memory)))
            await asyncio.sleep(max(0.5, seconds / 60))

    await asyncio.gather(watch(), *(client(number) for number in range(session.job["clients"])))
    return {
        "told": told,
        "wrong": wrong[:3],
        "faults": len(wrong),
        "memory": memory,
        "seconds": time.monotonic() - began,
    }


async def end(session: Session) -> dict[str, Any]:
    """SIGTERM while replies are being written: these are finished, and nothing new is let in."""
    ask = {**session.job["changing"], "tokens": 100}
    whole = await session.answer(ask)
    sent = asyncio.Event()
    streams = [asyncio.create_task(session.stream(ask, lambda count: sent.set())) for _ in range(4)]
    await sent.wait()
    session.process.send_signal(signal.SIGTERM)
    ended = await asyncio.gather(*streams, return_exceptions=True)
    late = ""
    try:
        late = str((await session.answer(ask))["status"])
    except openai.APIConnectionError as error:
        late = type(error).__name__
    status = await asyncio.to_thread(session.process.wait, 60)
    texts = [each["text"] if isinstance(each, dict) else repr(each) for each in ended]
    return {"whole": whole["text"], "texts": texts, "late": late, "status": status}


def main() -> None:
    """Start, ask, end, tell."""
    source, target = (Path(name) for name in sys.argv[1:])
    job = json.loads(source.read_text())
    session = Session(job, target.with_name("server.txt"))
    found: dict[str, Any] = {}
    try:
        found["ready"] = session.wait()
        asyncio.run(everything(session, found))
    finally:
        if session.process.poll() is None:
            session.process.kill()
        target.write_text(json.dumps(found))


async def everything(session: Session, found: dict[str, Any]) -> None:
    """Do all of it in order; what was seen until something fell is kept."""
    for part in (alone, refusals, changes, leaving, load):
        began = time.monotonic()
        found[part.__name__] = await part(session)
        found[part.__name__]["took"] = time.monotonic() - began
    found["counters"] = session.counters()
    if session.job["doctor"]:
        ran = subprocess.run(
            session.job["doctor"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **session.job["environment"]},
        )
        found["doctor"] = {"status": ran.returncode, "out": ran.stdout, "err": ran.stderr}
    found["end"] = await end(session)


if __name__ == "__main__":
    main()
