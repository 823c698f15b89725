"""What the monitor hands to other libraries arrives there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jdcore import monitor
from jdcore.aggregation import UPGrad

MATRIX = torch.tensor([[1.0, 0.0], [-3.0, 4.0]])  # lengths 1 and 5, cosine -0.6


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer, monitor.record(monitor.TensorBoardWriter(writer)):
        for _ in range(3):
            UPGrad()(MATRIX)

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scores = events.Scalars("jd/alignment")
    assert [score.step for score in scores] == [0, 1, 2]
    assert scores[0].value == pytest.approx(-0.6)


def test_a_logger_of_lightning_takes_the_numbers(tmp_path: Path) -> None:
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.CSVLogger(tmp_path)

    with monitor.record(monitor.LoggerWriter(logger)):
        UPGrad()(MATRIX)
    logger.save()

    [file] = tmp_path.rglob("metrics.csv")
    header, row = file.read_text().splitlines()
    numbers = dict(zip(header.split(","), row.split(","), strict=True))
    assert float(numbers["jd/conflicting_pairs"]) == 1.0


@pytest.mark.filterwarnings("default:::lightning")  # it calls what torch deprecates
def test_the_callback_of_lightning_stops_when_the_training_fails() -> None:
    lightning = pytest.importorskip("lightning")
    from jdcore.monitor.lightning import MonitorCallback

    class Failing(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: object, index: int) -> None:
            UPGrad()(MATRIX)
            if index == 1:
                raise RuntimeError("out of coffee")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = MonitorCallback(every=1)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(torch.zeros(3, 2))
    with pytest.raises(RuntimeError, match="out of coffee"):
        trainer.fit(Failing(), loader)
    UPGrad()(MATRIX)

    assert len(callback.history) == 2


def test_the_table_is_a_frame_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    with monitor.record() as history:
        UPGrad()(MATRIX)

    frame = history.frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc[0, "conflicting_pairs"] == 1.0
