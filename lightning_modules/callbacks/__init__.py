"""What watches or changes a network while it trains: one callback a file, each reading the outputs of the steps."""

from lightning_modules.callbacks.claims import ClaimMonitor
from lightning_modules.callbacks.clustering import ReclusterSchedule
from lightning_modules.callbacks.diversity import DiversityMonitor
from lightning_modules.callbacks.evolution import Evolution, EvolutionPolicy
from lightning_modules.callbacks.freezing import FreezingEvent, FreezingSchedule
from lightning_modules.callbacks.last_checkpoint import LastCheckpoint
from lightning_modules.callbacks.prediction_writer import PredictionWriter
from lightning_modules.callbacks.random_state import RandomState
from lightning_modules.callbacks.report_page import ReportPage
from lightning_modules.callbacks.routing_monitor import RoutingMonitor
from lightning_modules.callbacks.run_record import RunRecord
from lightning_modules.callbacks.run_report import RunReport

__all__ = [
    "ClaimMonitor",
    "DiversityMonitor",
    "Evolution",
    "EvolutionPolicy",
    "FreezingEvent",
    "FreezingSchedule",
    "LastCheckpoint",
    "PredictionWriter",
    "RandomState",
    "ReclusterSchedule",
    "ReportPage",
    "RoutingMonitor",
    "RunRecord",
    "RunReport",
]
