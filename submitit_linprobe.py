"""Submit linear probes and kNN to a cluster: all flags of main_linprobe.py, and the cluster's (see --help).

python submitit_linprobe.py --job_dir DIR --finetune RUN/checkpoint-last.pth --model vit_base_patch16 --data_path DATA
"""

import sys

from util.cluster.launch import launch

if __name__ == "__main__":
    sys.exit(launch("main_linprobe"))
