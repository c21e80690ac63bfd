"""Small files of runs, written so that no kill loses them, and file names that are safe to print."""

# The file that holds the newest state of a run.
LAST_CHECKPOINT = "checkpoint-last.pth"
