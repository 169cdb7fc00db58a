"""Made the files beside it: a byte-level BPE of 512 tokens from this repository's LICENSE, with a ChatML template.

Run:    python tests/data/tokenizer/make.py
"""

from pathlib import Path

from burnish.model.text.tokenizer import Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def main() -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train([str(HERE.parents[2] / "LICENSE")], trainer)
    end_of_text = backend.token_to_id("<|endoftext|>")
    Tokenizer(
        backend, eos="<|im_end|>", pad="<|endoftext|>", stop_ids=[end_of_text], chat_template=CHATML
    ).save(HERE)


if __name__ == "__main__":
    main()
