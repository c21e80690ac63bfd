"""The old name of util.cluster.job, for one release: jobs that were submitted before are stored by it."""

from util.cluster.job import Job

__all__ = ["Job"]
