"""What needs nothing else: small files of runs, names that are safe to print, the cores of a process."""

# The file that holds the newest state of a run.
LAST_CHECKPOINT = "checkpoint-last.pth"
