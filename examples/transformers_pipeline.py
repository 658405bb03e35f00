"""Steer a transformers pipeline: inside the block it runs steered, outside as ever.

python examples/transformers_pipeline.py gemma-3-270m happy.safetensors "Today I"
"""

import sys

from transformers import pipeline

from expertsteer import SteeringPack, load_model

name, path, prompt = sys.argv[1:4]
target = load_model(name)
pack = SteeringPack.load(path, target.model)
generate = pipeline("text-generation", model=target.model, tokenizer=target.tokenizer)
options = {"max_new_tokens": 20, "do_sample": False, "return_full_text": False}

print("unsteered:", generate(prompt, **options)[0]["generated_text"])
with pack.apply(target.model, strength=0.1):
    print("steered:", generate(prompt, **options)[0]["generated_text"])
