"""Writes a text with onnxruntime-genai, for hosts.py: the seed, and then every character as it comes.

python host_genai.py FOLDER TASK, where TASK is JSON: seed, length, temperature, top_k, rng_seed.
"""

import json
import sys

import onnxruntime_genai as genai

folder, task = sys.argv[1], json.loads(sys.argv[2])
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
