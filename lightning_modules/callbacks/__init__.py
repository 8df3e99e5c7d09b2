"""What watches or changes a network while it trains: one callback a file, each reading the outputs of the steps."""

from lightning_modules.callbacks.claims import ClaimMonitor, ClaimWatch
from lightning_modules.callbacks.clustering import ReclusterSchedule
from lightning_modules.callbacks.diversity import DiversityMonitor
from lightning_modules.callbacks.evolution import Evolution, EvolutionPolicy
from lightning_modules.callbacks.last_checkpoint import LastCheckpoint
from lightning_modules.callbacks.prediction_writer import PredictionWriter
from lightning_modules.callbacks.random_state import RandomState
from lightning_modules.callbacks.recovery import AutoRecovery
from lightning_modules.callbacks.report_page import ReportPage
from lightning_modules.callbacks.resolvent_monitor import ResolventMonitor
from lightning_modules.callbacks.routing_monitor import RoutingMonitor
from lightning_modules.callbacks.run_notebook import RunNotebook
from lightning_modules.callbacks.run_record import RunRecord
from lightning_modules.callbacks.run_report import RunReport
from lightning_modules.callbacks.stability import StabilityMonitor
from lightning_modules.callbacks.surgery import MetricCondition, SurgeryEvent, SurgerySchedule

__all__ = [
    "AutoRecovery",
    "ClaimMonitor",
    "ClaimWatch",
    "DiversityMonitor",
    "Evolution",
    "EvolutionPolicy",
    "LastCheckpoint",
    "MetricCondition",
    "PredictionWriter",
    "RandomState",
    "ReclusterSchedule",
    "ReportPage",
    "ResolventMonitor",
    "RoutingMonitor",
    "RunNotebook",
    "RunRecord",
    "RunReport",
    "StabilityMonitor",
    "SurgeryEvent",
    "SurgerySchedule",
]
