"""Writes a trained model as an ONNX folder that any app can embed. `python export.py --help` lists every option.

python export.py                       the newest run's best checkpoint -> RUN/export
python export.py runs/shakespeare --out my-model
"""

from smallm.cli.main import export, run

if __name__ == "__main__":
    raise SystemExit(run(export))
