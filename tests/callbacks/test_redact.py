"""Secrets go, everything else stays."""

import logging

import pytest
import yaml

from ptl.callbacks.redact import MASK, SecretFilter, redact, redact_tree, secret_values

HF = "hf_" + "aBcD1234" * 4 + "xy"
WANDB_OLD = "0123456789abcdef" * 2 + "01234567"
WANDB_NEW = "wandb_v1_" + "Ab1_" * 18
COMMIT = "fedcba9876543210" * 2 + "fedcba98"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"login with {HF} now", HF),
        (f"--data.token {HF}", HF),
        (f"key: {WANDB_NEW}", WANDB_NEW),
        (f"WANDB_API_KEY={WANDB_OLD} ptl fit", WANDB_OLD),
        (f"wandb login {WANDB_OLD}", WANDB_OLD),
        (f"machine api.wandb.ai login user password {WANDB_OLD}", WANDB_OLD),
        (f'{{"api_key": "{WANDB_OLD}"}}', WANDB_OLD),
        (f"wandb: {{apikey: {WANDB_OLD}}}", WANDB_OLD),
        ("git clone https://me:s3cr3tword@example.org/x.git", "s3cr3tword"),
        ("https://ghp_0123456789abcdefghijABCDEFGHIJ012345@github.com/a/b", "ghp_0123456789abcdefghijABCDEFGHIJ012345"),
        ("s3://key:sec/ret@bucket/path?x=1 https://h/p?token=abcdef123&y=2", "abcdef123"),
        ("https://s3.example.org/f?X-Amz-Signature=deadbeef01&X-Amz-Date=1", "deadbeef01"),
        ("--password hunter2000 --lr 1e-4", "hunter2000"),
        ("--db.password=hunter2000", "hunter2000"),
        ("auth_token: abcdefgh12345678", "abcdefgh12345678"),
        ("Authorization: Bearer abcdefgh.ijkl-mnop", "abcdefgh.ijkl-mnop"),
        ("Authorization: Basic dXNlcjpwYXNzd29yZA==", "dXNlcjpwYXNzd29yZA"),
        ("aws_secret_access_key = 'wJalrXUtnFEMI/K7MDENG'", "wJalrXUtnFEMI/K7MDENG"),
        ("token: abcdefgh12345678ijkl", "abcdefgh12345678ijkl"),
        ("AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
        ("sk-proj-abcdefghijklmnopqrstuvwx", "sk-proj-abcdefghijklmnopqrstuvwx"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF_123", "eyJzdWIiOiIxMjM0In0"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAK\n-----END RSA PRIVATE KEY-----\nafter", "MIIEow\nIBAAK"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz", "b3BlbnNz"),
    ],
)
def test_a_secret_goes(text, secret):
    clean = redact(text, {})
    assert secret not in clean and MASK in clean


@pytest.mark.parametrize(
    "text",
    [
        f"commit {COMMIT}",
        f'"commit": "{COMMIT}"',
        "pad_token: <|im_end|>",
        "eos_token='</s>' max_tokens=4096 token_budget: 8192 tokens_per_second: 1234.5",
        "new_tokens: [<think>, </think>]",
        "data.tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct",
        "monkey: see, monkey: do; key: value; keys: 3",
        "ptl fit -c configs/base.yaml --model.policy.name meta-llama/Llama-3.1-8B --trainer.max_steps 10",
        "https://huggingface.co/datasets/x/y?tab=1 s3://bucket/key zip://a.jsonl::b.zip",
        "password: null",
        "secretary and keyboard and passwordless",
        "sha256: " + "ab" * 32,
        "hf_hub_offline",
        "token: <|a_long_special_token|>",
        "token: user",
        "user@example.org",
        "What is the password of my router? It is on the back.",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text, {}) == text


ENVIRONMENT = {
    "HF_TOKEN": "some-odd-value",
    "MY_SERVICE_PASSWORD": "Tr0ub4dor&3",
    "DEPLOYKEY": "abc123def",
    "TOKENIZERS_PARALLELISM": "false-ish-long",
    "KEYBOARD": "azerty-layout",
    "SOME_KEY_COUNT": "12345678",
    "API_KEY_MODE": "disabled",
    "SSH_KEY_PATH": "/",
    "HOME": "/home/someone",
    "SHORT_SECRET": "abc",
}


def test_values_of_secret_variables_go_wherever_they_are():
    assert set(secret_values(ENVIRONMENT)) == {"some-odd-value", "Tr0ub4dor&3", "abc123def"}
    text = "run some-odd-value with xTr0ub4dor&3x in /home/someone, azerty-layout, 12345678, disabled"
    clean = redact(text, ENVIRONMENT)
    assert clean == f"run {MASK} with x{MASK}x in /home/someone, azerty-layout, 12345678, disabled"


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("PTL_TEST_SECRET", "a-very-own-value")
    assert redact("is a-very-own-value") == f"is {MASK}"


def test_a_config_tree_keeps_its_form():
    config = yaml.safe_load(
        f"""
        trainer: {{max_steps: 10, logger: {{api_key: {WANDB_OLD}, offline: true}}}}
        data: {{train: [{{path: "https://u:pw12345@host/x.jsonl"}}], tokenizer: smol, token: {HF[3:]}, password: null}}
        model: {{policy: {{new_tokens: ["<a>"], pad_token: "<p>"}}, lr: 1.0e-4}}
        """
    )
    clean = redact_tree(config, {})
    assert clean["trainer"] == {"max_steps": 10, "logger": {"api_key": MASK, "offline": True}}
    assert clean["data"]["train"] == [{"path": f"https://{MASK}@host/x.jsonl"}]
    assert (clean["data"]["token"], clean["data"]["password"], clean["data"]["tokenizer"]) == (MASK, None, "smol")
    assert clean["model"] == config["model"]
    assert config["trainer"]["logger"]["api_key"] == WANDB_OLD  # the config itself is not changed
    assert redact_tree(("a", 1), {}) == ("a", 1)


def test_logs(caplog):
    logger = logging.getLogger("ptl.test_redact")
    caplog.handler.addFilter(filter_ := SecretFilter())
    try:
        logger.warning("token %s of %d", HF, 3)
        logger.warning("plain %d", 4)
    finally:
        caplog.handler.removeFilter(filter_)
    assert [record.getMessage() for record in caplog.records] == [f"token {MASK} of 3", "plain 4"]


@pytest.mark.parametrize("text", ["the Basic Input/Output System", "Bearer instruments", "Basic understanding of it"])
def test_words_after_bearer_and_basic_stay(text):
    assert redact(text) == text
