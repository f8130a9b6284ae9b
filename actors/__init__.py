"""Long-lived actors and where they live: clusters, placements, engines and pools of them.

Importing this imports neither Ray nor vLLM nor torch; what needs them imports them when it is used.
"""

from __future__ import annotations

from actors.actor import ActorHandle, ActorStream, actor, method
from actors.bundles import Group, Placement, Reservation
from actors.cluster import ActorInfo, Cluster, ClusterResources, NodeResources
from actors.echo_engine import EchoEngine
from actors.engine import (
    ChatMessage,
    Completion,
    Delta,
    Engine,
    EngineInfo,
    EngineLoad,
    EngineSpec,
    GenerateRequest,
    Reset,
    Sampling,
    Usage,
)
from actors.executor import RayExecutor
from actors.front import PoolFront
from actors.local_cluster import LocalCluster
from actors.members.lives import ActorHealth, ActorRestarted, ActorStarted, ActorStopped, GaveUp, Monitor
from actors.members.supervision import Backoff, Supervisor
from actors.models import demo_model, tiny_model
from actors.pool import DeltaStream, EnginePool, PoolOptions, PoolStats, ReplicaProgress, ReplicaStats
from actors.ray_cluster import RayCluster
from actors.remote_engine import RemoteEngine
from actors.vllm_engine import VLLMEngine

__all__ = (
    "ActorHandle",
    "ActorHealth",
    "ActorInfo",
    "ActorRestarted",
    "ActorStarted",
    "ActorStopped",
    "ActorStream",
    "Backoff",
    "ChatMessage",
    "Cluster",
    "ClusterResources",
    "Completion",
    "Delta",
    "DeltaStream",
    "EchoEngine",
    "Engine",
    "EngineInfo",
    "EngineLoad",
    "EnginePool",
    "EngineSpec",
    "GaveUp",
    "GenerateRequest",
    "Group",
    "LocalCluster",
    "Monitor",
    "NodeResources",
    "Placement",
    "PoolFront",
    "PoolOptions",
    "PoolStats",
    "RayCluster",
    "RayExecutor",
    "RemoteEngine",
    "ReplicaProgress",
    "ReplicaStats",
    "Reservation",
    "Reset",
    "Sampling",
    "Supervisor",
    "Usage",
    "VLLMEngine",
    "actor",
    "demo_model",
    "method",
    "tiny_model",
)
