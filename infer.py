"""Generates text with an exported model, or measures it on a text. `python infer.py --help` lists every option.

python infer.py --seed "O God, O God!"
python infer.py --model runs/shakespeare --seed "ROMEO:" --max-length 500 --temperature 0.8 --top-k 40
python infer.py --perplexity my.txt
"""

from smallm.cli.main import infer, run

if __name__ == "__main__":
    raise SystemExit(run(infer))
