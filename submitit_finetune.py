"""Submit classifiers to a cluster: all flags of main_finetune.py, and the cluster's (see --help).

python submitit_finetune.py --nodes 4 --job_dir DIR --finetune RUN/checkpoint-last.pth --data_path DATA
"""

import sys

from util.cluster.launch import launch

if __name__ == "__main__":
    sys.exit(launch("main_finetune"))
