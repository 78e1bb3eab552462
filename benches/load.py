#!/usr/bin/env python3
"""Many clients at once against a running server: is every answer there and right, how long does it take, and does the
server's memory stay where it is?

    deepburn serve --model tests/fixtures/tiny-yarn --port 8000 &
    benches/load.py http://127.0.0.1:8000 --clients 16 --seconds 20 --pid $! --output load.json

Before the load, one client asks for the greedy answer to each of the prompts; under load every answer to the same
prompt has to be the same. A server that refuses a request because its queue is full (429) is asked again, and the
refusal counted. It needs nothing but Python's standard library.
"""

import argparse
import http.client
import json
import math
import os
import pathlib
import platform
import random
import threading
import time
import urllib.parse


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--prompts", type=int, default=32, help="different prompts")
    parser.add_argument("--new-tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path)
    return parser.parse_args()


class Client:
    """A connection that stays open."""

    def __init__(self, url):
        self.place = urllib.parse.urlsplit(url).netloc
        self.connection = http.client.HTTPConnection(self.place, timeout=600)

    def post(self, body):
        headers = {"Content-Type": "application/json"}
        self.connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = self.connection.getresponse()
        return response.status, response.read().decode()

    def answer(self, body):
        """The text, and seconds to the first part and to the end; none of them if the queue is full."""
        start = time.perf_counter()
        if not body["stream"]:
            status, text = self.post(body)
            if status == 429:
                return None
            assert status == 200, (status, text)
            took = time.perf_counter() - start
            return json.loads(text)["choices"][0]["text"], took, took
        headers = {"Content-Type": "application/json"}
        self.connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = self.connection.getresponse()
        if response.status == 429:
            response.read()
            return None
        assert response.status == 200, (response.status, response.read())
        pieces, first, done = [], None, False
        for line in response:
            line = line.decode().strip()
            if line == "data: [DONE]":
                done = True
            elif line:
                first = first or time.perf_counter() - start
                part = json.loads(line.removeprefix("data: "))
                assert "error" not in part, part
                pieces.append(part["choices"][0]["text"])
        assert done, "the stream has no end"
        return "".join(pieces), first, time.perf_counter() - start


def resident(pid):
    """Bytes of memory that a process holds."""
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def quantile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def main():
    args = arguments()
    chance = random.Random(args.seed)
    words = "the of expert token layer model load route cache latent 7 42 ( ) { } fn let".split()
    prompts = [" ".join(chance.choices(words, k=chance.randint(1, 40))) for _ in range(args.prompts)]

    def body(prompt, stream):
        return {
            "prompt": prompt, "max_tokens": args.new_tokens, "temperature": 0, "ignore_eos": True, "stream": stream,
        }  # fmt: skip

    alone = Client(args.url)
    known = [alone.answer(body(prompt, False))[0] for prompt in prompts]
    different = len(set(known))
    assert different > args.prompts // 2, f"only {different} different answers could tell a mix-up"

    finished, refusals, problems, memory = [], [0], [], []
    start = time.perf_counter()
    end = start + args.seconds

    def work(number):
        choice, client = random.Random(args.seed + 1 + number), Client(args.url)
        while time.perf_counter() < end:
            which = choice.randrange(len(prompts))
            try:
                told = client.answer(body(prompts[which], choice.random() < 0.5))
            except Exception as error:  # noqa: BLE001  whatever it is, it is what this looks for
                problems.append(f"client {number}: {error!r}")
                return
            if told is None:
                refusals[0] += 1
                time.sleep(0.05)
                continue
            text, first, took = told
            if text != known[which]:
                problems.append(f"client {number}: {text!r} for prompt {which}, alone {known[which]!r}")
            finished.append((first, took))

    def watch():
        while time.perf_counter() < end:
            memory.append((round(time.perf_counter() - start, 2), resident(args.pid)))
            time.sleep(0.25)

    threads = [threading.Thread(target=work, args=[number]) for number in range(args.clients)]
    if args.pid:
        threads.append(threading.Thread(target=watch))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start

    seconds = [answer[1] for answer in finished]
    result = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()},
        "clients": args.clients,
        "seconds": round(took, 2),
        "prompts": args.prompts,
        "different_answers": different,
        "new_tokens": args.new_tokens,
        "answers": len(finished),
        "refusals": refusals[0],
        "problems": problems,
        "answers_per_second": round(len(finished) / took, 2),
        "tokens_per_second": round(len(finished) * args.new_tokens / took, 1),
        "latency_seconds": {f"p{share}": round(quantile(seconds, share / 100), 4) for share in (50, 90, 99)},
        "first_part_seconds": {
            f"p{share}": round(quantile([answer[0] for answer in finished], share / 100), 4) for share in (50, 99)
        },
        "resident_bytes": memory,
    }
    shown = {key: value for key, value in result.items() if key != "resident_bytes"}
    print(json.dumps(shown, indent=1))
    if memory:
        quarter = max(1, len(memory) // 4)
        print(f"memory: {memory[0][1] >> 20} MiB at first, {max(held for _, held in memory) >> 20} MiB at most, "
              f"{memory[quarter][1] >> 20} MiB after a quarter, {memory[-1][1] >> 20} MiB at the end")  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if problems:
        raise SystemExit(f"{len(problems)} wrong or lost answers")


if __name__ == "__main__":
    main()
