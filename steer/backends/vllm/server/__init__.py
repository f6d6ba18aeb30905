"""The server: vLLM's own, with a middleware in front that knows a folder of steerings.

| file | what |
|---|---|
| `settings` | what the operator decides, as a YAML file |
| `directory` | the folder: names, fingerprints, what changed, what cannot be served and why |
| `asking` | one request and one key -> what is served, or a refusal; no network in it |
| `bodies` | bytes of requests and replies |
| `metrics` | counters in vLLM's own `/metrics` |
| `middleware` | the ASGI class that vLLM is given with `--middleware` |
| `run` | the arguments with which vLLM is started |

Nothing here imports vLLM. See `docs/serving.md`.
"""
