"""Find, apply and verify changes to how a reasoning model thinks. Importing this package does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer.lazy import export

if TYPE_CHECKING:
    from steer.backends.vllm.llm import SteeredLLM as SteeredLLM
    from steer.coverage import Coverage as Coverage
    from steer.coverage import coverage as coverage
    from steer.directions import Direction as Direction
    from steer.errors import SteerError as SteerError
    from steer.expert_scores import ExpertScores as ExpertScores
    from steer.generation import Prompt as Prompt
    from steer.generation import Sampling as Sampling
    from steer.identity import ModelIdentity as ModelIdentity
    from steer.interventions import Add as Add
    from steer.interventions import BiasRouter as BiasRouter
    from steer.interventions import Custom as Custom
    from steer.interventions import ProjectOut as ProjectOut
    from steer.interventions import ScaleExperts as ScaleExperts
    from steer.interventions import SetComponent as SetComponent
    from steer.model import SteerableModel as SteerableModel
    from steer.model import load as load
    from steer.model import wrap as wrap
    from steer.patches import Patch as Patch
    from steer.prompts import RawText as RawText
    from steer.scores import HeadScores as HeadScores
    from steer.steering import Steering as Steering
    from steer.traces import Trace as Trace
    from steer.traces import Traces as Traces

__version__ = "0.1.0"

export(
    __name__,
    {
        "Add": "steer.interventions",
        "BiasRouter": "steer.interventions",
        "Coverage": "steer.coverage",
        "Custom": "steer.interventions",
        "Direction": "steer.directions",
        "ExpertScores": "steer.expert_scores",
        "HeadScores": "steer.scores",
        "ModelIdentity": "steer.identity",
        "Patch": "steer.patches",
        "ProjectOut": "steer.interventions",
        "Prompt": "steer.generation",
        "RawText": "steer.prompts",
        "Sampling": "steer.generation",
        "ScaleExperts": "steer.interventions",
        "SetComponent": "steer.interventions",
        "SteerError": "steer.errors",
        "SteerableModel": "steer.model",
        "SteeredLLM": "steer.backends.vllm.llm",
        "Steering": "steer.steering",
        "Trace": "steer.traces",
        "Traces": "steer.traces",
        "coverage": "steer.coverage",
        "load": "steer.model",
        "wrap": "steer.model",
    },
)
