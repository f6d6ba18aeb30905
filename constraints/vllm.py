"""Make `.venv-vllm`, or repair it: `python3.11 constraints/vllm.py` (what `make vllm` runs).

It holds vLLM built for processors, and what the lane `vllm` needs of its dependencies; torch, transformers and the rest
are read from `.venv`, whose pins lie within vLLM's ranges. Left out is what only pictures, sound and vLLM's cloud need.
"""

from beside import Beside

if __name__ == "__main__":
    Beside("vllm", "vLLM").main()
