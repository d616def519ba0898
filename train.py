"""Trains a character-level language model on a text. `python train.py --help` lists every option.

python train.py                                            built-in text, less than a minute on two cores
python train.py --data my.txt                              your own text
python train.py --data my.txt --minutes 5                  size, batch and schedule chosen for this text
python train.py --config configs/shakespeare-cpu.toml --data shakespeare --out runs/shakespeare
python train.py --resume runs/shakespeare                  continues a run exactly where it stopped
accelerate launch --config_file configs/accelerate/multi-gpu.yaml train.py --config configs/shakespeare-gpu.toml
"""

from smallm.cli.main import run, train

if __name__ == "__main__":
    raise SystemExit(run(train))
