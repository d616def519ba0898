"""Generates a text with onnxruntime-genai, for hosts.py: prints the seed, then each character at once.

    python benchmarks/host_genai.py FOLDER TASK

FOLDER is an export folder, TASK a JSON object with seed, length, temperature, top_k and rng_seed.
"""

import argparse
import json


def main() -> None:
    """Generates the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("task", metavar="TASK", type=json.loads)
    arguments = parser.parse_args()
    generate(arguments.folder, arguments.task)


def generate(folder: str, task: dict) -> None:
    """Prints the seed and the characters after it."""
    import onnxruntime_genai as genai  # here, so that --help works without the package

    config = genai.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
    model = genai.Model(config)
    tokenizer, parameters = genai.Tokenizer(model), genai.GeneratorParams(model)
    ids = tokenizer.encode(task["seed"])
    options = {"temperature": task["temperature"], "top_k": task["top_k"], "random_seed": task["rng_seed"]}
    parameters.set_search_options(max_length=len(ids) + task["length"], do_sample=True, **options)
    generator, decoder = genai.Generator(model, parameters), tokenizer.create_stream()
    print(task["seed"], end="", flush=True)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
        print(decoder.decode(generator.get_next_tokens()[0]), end="", flush=True)


if __name__ == "__main__":
    main()
