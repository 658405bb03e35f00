"""vLLM with the plugin says what transformers with our hooks says, whatever the engine does."""

from __future__ import annotations

import itertools

import pytest

from vllm_helpers import TOLERANCE, ask, check_same, params_of, running

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm

POSITIONS = ("all", "prompt", "generated", "last")
BLOCK = 32


@pytest.fixture(scope="module")
def engine(checkpoint, packs):
    """Return an engine that reads prompts in chunks of a few tokens, and caches prefixes."""
    with running(
        checkpoint,
        packs,
        block_size=BLOCK,
        max_num_batched_tokens=16,
        enable_prefix_caching=True,
    ) as llm:
        yield llm


@pytest.fixture(autouse=True)
def forget_prefixes(engine):
    engine.reset_prefix_cache()


def request(pack="first", strength=0.5, positions="all"):
    return {"pack": pack, "strength": strength, "positions": positions}


def cached(output) -> int:
    return output.num_cached_tokens


def long_prompt(prompts) -> list[int]:
    assert len(prompts[1]) > BLOCK + 16  # more than one block, more than one chunk
    return prompts[1]


def test_the_comparisons_could_tell_one_steering_from_another(prompts, reference):
    steerings = [None, *(request(positions=where) for where in POSITIONS)]
    answers = [reference(prompts[1], steering) for steering in steerings]
    assert answers[0][0] != answers[1][0]
    for (tokens, logprobs), (others, other_logprobs) in itertools.combinations(answers, 2):
        gap = max(abs(a - b) for a, b in zip(logprobs, other_logprobs, strict=True))
        assert tokens != others or gap > 10 * TOLERANCE


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions(engine, prompts, reference, positions):
    steering = request(positions=positions)
    outputs = ask(engine, prompts, [steering] * len(prompts))
    for output, prompt in zip(outputs, prompts, strict=True):
        check_same(output, reference(prompt, steering))


def test_the_packs_own_strength_and_all_positions_are_the_defaults(engine, prompts, reference):
    (output,) = ask(engine, prompts[:1], [{"pack": "first"}])
    check_same(output, reference(prompts[0], request(strength=0.4)))


def test_several_packs_add_up(engine, prompts, reference):
    steering = [request(), request("second", -0.4, "generated"), request("first", 0.2, "last")]
    outputs = ask(engine, prompts[:2], [steering] * 2)
    for output, prompt in zip(outputs, prompts[:2], strict=True):
        check_same(output, reference(prompt, steering))


def test_requests_of_one_batch_are_steered_each_by_itself(engine, prompts, reference):
    steerings = [
        None,
        request(),
        request(strength=-0.5),
        request(positions="generated"),
        request("second", 0.4, "prompt"),
        [request(), request("second", 0.3, "last")],
        None,
        request("second"),
        request("second", positions="last"),
    ]
    asked = [prompts[n % len(prompts)] for n in range(len(steerings))]
    outputs = ask(engine, asked, steerings)
    for output, prompt, steering in zip(outputs, asked, steerings, strict=True):
        check_same(output, reference(prompt, steering))


def test_each_of_several_samples_is_steered(engine, prompts, reference):
    steering = request(positions="generated")
    # vLLM samples several answers only at random; of one token there is one choice.
    (output,) = ask(engine, prompts[:1], [steering], n=2, temperature=1.0, top_k=1)
    tokens, _ = reference(prompts[0], steering)
    assert [list(sample.token_ids) for sample in output.outputs] == [tokens, tokens]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("steered_first", [True, False])
def test_a_prefix_is_never_taken_from_another_steering(
    engine, prompts, reference, positions, steered_first
):
    prompt = long_prompt(prompts)
    orders = [request(positions=positions), None]
    for steering in orders if steered_first else reversed(orders):
        (output,) = ask(engine, [prompt], [steering])
        check_same(output, reference(prompt, steering))
    (stronger,) = ask(engine, [prompt], [request(strength=0.8, positions=positions)])
    check_same(stronger, reference(prompt, request(strength=0.8, positions=positions)))


def test_an_unsteered_request_finds_nothing_of_a_steered_one(engine, prompts):
    prompt = long_prompt(prompts)
    (first,) = ask(engine, [prompt], [request()])
    (again,) = ask(engine, [prompt], [request()])
    (unsteered,) = ask(engine, [prompt], [None])
    (opposite,) = ask(engine, [prompt], [request(strength=-0.5)])
    assert [cached(one) for one in (first, again, unsteered, opposite)] == [0, BLOCK, 0, 0]


def test_a_prompt_is_shared_where_only_generated_tokens_are_steered(engine, prompts, reference):
    prompt = long_prompt(prompts)
    ask(engine, [prompt], [None])
    (output,) = ask(engine, [prompt], [request(positions="generated")])
    assert cached(output) == BLOCK
    check_same(output, reference(prompt, request(positions="generated")))


@pytest.mark.parametrize("positions", POSITIONS)
def test_an_answer_that_becomes_a_prompt_is_steered_as_one(engine, prompts, reference, positions):
    steering = request(positions=positions)
    prompt, more = prompts[0], 40
    (first,) = ask(engine, [prompt], [steering], max_tokens=more)
    check_same(first, reference(prompt, steering, more))
    longer = prompt + list(first.outputs[0].token_ids) + prompts[2]
    (output,) = ask(engine, [longer], [steering])
    check_same(output, reference(longer, steering))


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        (request("sad"), "'sad', but expected one that this server holds: first, second"),
        (request(strength=0), r"steering.strength=0, but expected another number"),
        (request(strength=float("nan")), "finite"),
        (request(strength=1e38), "finite in float32"),
        (request(positions="middle"), "positions='middle'"),
        ("happy", "steering='happy', but expected an object"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(engine, prompts, reference, steering, message):
    with pytest.raises(ValueError, match=message):
        ask(engine, prompts[:2], [None, steering])
    (output,) = ask(engine, prompts[:1], [None])
    check_same(output, reference(prompts[0]))


def test_a_request_cannot_speak_for_the_plugin(engine, prompts, reference):
    forged = {"strengths": {"first": [9.0, 9.0, 9.0]}, "keys": ["", "", ""]}
    params = params_of(extra_args={"expertsteer": forged})
    (output,) = engine.generate([{"prompt_token_ids": prompts[0]}], params, use_tqdm=False)
    check_same(output, reference(prompts[0]))
