"""Clips that cannot be read during training or evaluation: skipped and counted, until there are too many."""

import logging

from speechbrain import Stage

from accent_plugin.errors import DataError
from accent_plugin.training import distributed

logger = logging.getLogger(__name__)

# The remedy for unreadable data.
PREPARE_AGAIN = "prepare the data again and rerun the same command: it resumes from the last checkpoint"

_DOING = {Stage.TRAIN: "training", Stage.VALID: "validating", Stage.TEST: "evaluating"}


class UnreadClips:
    """Which clips of each stage could not be read, and why.

    `max_share` is the fraction of a stage's clips above which `note` and `share` raise an error. A single clip is
    tolerated unless it is 0.
    """

    def __init__(self, max_share):
        self._max_share = max_share
        self._unread, self._clips = {stage: {} for stage in Stage}, {}

    def __getitem__(self, stage):
        """The clips of a stage: {id: why it could not be read}."""
        return self._unread[stage]

    def begin(self, stage, loader):
        """Start counting for a loader; None, or a loader without a data set, has no clips."""
        self._unread[stage], self._clips[stage] = {}, len(getattr(loader, "dataset", None) or ())

    def note(self, batch, stage):
        """Count the unreadable clips of a `Batch`, and log each once; raise a DataError if there are too many."""
        unread = self._unread[stage]
        for name, why in batch.lost:
            if name not in unread:
                logger.warning("skipped clip %s: %s", name, why)
            unread[name] = why
        self._limit(stage)

    def share(self, stage):
        """Merge the unreadable clips of all processes; raise a DataError if there are too many."""
        parts = distributed.all_gather(self._unread[stage])
        self._unread[stage] = {name: why for part in parts for name, why in part.items()}
        distributed.broadcast_from_main(self._limit, stage)

    def _limit(self, stage):
        unread, clips, share = self._unread[stage], self._clips.get(stage, 0), self._max_share
        if unread and len(unread) > (max(1.0, share * clips) if share else 0):
            name, why = next(iter(unread.items()))
            raise DataError(
                f"{len(unread)} of {clips} clips cannot be read while {_DOING[stage]}, "
                f"more than max_unreadable_fraction ({share:g}) allows; the first is {name}: {why}\n{PREPARE_AGAIN}"
            )
