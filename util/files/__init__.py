"""Small files of runs, written so that no kill loses them, and file names that are safe to print."""
