"""The small LLaVA-NeXT and LLaVA-OneVision: stock classes, and a tokenizer of words and letters."""

from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from tokensel.book.mini.canvas import CELLS, PATCH, TILE
from tokensel.book.mini.general import BACKGROUNDS
from tokensel.book.mini.words import COLORS, SHAPES
from tokensel.book.mini.world import DRAW, draw_page
from tokensel.utils.errors import check_names
from tokensel.vlm.native import LlavaOnevisionProcessor

KINDS = ("llava-next", "llava-onevision")
# The five grids of LLaVA-NeXT at 336 pixels a tile, at 64 (height, width).
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE], [TILE, 3 * TILE]]
# LLaVA-OneVision has every grid of up to six by six, and shrinks what is larger than nine tiles: to a quarter
# of the tokens at most. The largest page here has four tiles, so the small one shrinks what is larger than
# two: to a half at most.
MANY_PINPOINTS = [[rows * TILE, columns * TILE] for rows in range(1, 4) for columns in range(1, 4)]
SHRINKS = "anyres_max_2"
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:", "\n"]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER:"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}{{ '\\n' }}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% else %}ASSISTANT:"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}</s>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def questions_vocabulary(pages: int = 200) -> list[str]:
    """Every lower-case word of the world's questions and answers, by drawing ``pages`` of each task."""
    words = {*SHAPES, *COLORS, *BACKGROUNDS, "yes", "no"}
    for task in DRAW:
        for index in range(pages):
            for qa in draw_page(task, "train", index).questions:
                text = " ".join([qa.question, *qa.answers, *qa.options])
                words |= {
                    word.strip("?.,") for word in text.split() if word.strip("?.,").strip("-").islower()
                }
    return sorted(words)


@lru_cache(maxsize=1)
def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-case words are whole tokens, capitals and digits single ones: the text on a page is spelt out."""
    letters = [chr(code) for code in (*range(65, 91), *range(48, 58))]
    pieces = [
        *SPECIALS,
        "\u2581",
        "?",
        ".",
        ",",
        ":",
        "-",
        "%",
        *letters,
        *("\u2581" + w for w in questions_vocabulary()),
    ]
    tokenizer = Tokenizer(
        models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex("\u2581?[a-z][a-z-]*|\u2581|."), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="always", split=False), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens={"image_token": "<image>"},
    )


def build_processor(kind: str = KINDS[0]) -> ProcessorMixin:
    """Tokenizer and anyres image processor, as a checkpoint of this kind carries them.

    Raises:
        TokenselError: an unknown kind.
    """
    check_names([kind], KINDS)
    if kind == "llava-onevision":
        return LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessorPil(
                size={"height": TILE, "width": TILE}, image_grid_pinpoints=MANY_PINPOINTS
            ),
            tokenizer=build_tokenizer(),
            num_image_tokens=CELLS * CELLS,
            vision_feature_select_strategy="full",
            chat_template=TEMPLATE,
            vision_aspect_ratio=SHRINKS,
        )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def build_config(kind: str = KINDS[0]) -> LlavaNextConfig | LlavaOnevisionConfig:
    """Four layers of a vision tower, six of a language model: CLIP and Llama, or SigLIP and Qwen2.

    CLIP has a fifth layer, whose CLS token is trained on the whole tile; the language model receives layer
    -2.
    """
    tokenizer = build_tokenizer()
    vision: dict[str, Any] = dict(
        hidden_size=128, intermediate_size=512, num_attention_heads=4, image_size=TILE, patch_size=PATCH
    )
    text: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    special: dict[str, Any] = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")}
    if kind == "llava-onevision":
        special["video_token_id"] = -1  # it has no video token
        return LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**vision, num_hidden_layers=4, vision_use_head=False),
            text_config=Qwen2Config(**text),
            **special,
            vision_aspect_ratio=SHRINKS,
            image_grid_pinpoints=MANY_PINPOINTS,
            tie_word_embeddings=False,
        )
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision, num_hidden_layers=5, projection_dim=128),
        text_config=LlamaConfig(**text),
        **special,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=CELLS * CELLS,
        tie_word_embeddings=False,
    )


def build_mini_model(kind: str = KINDS[0]) -> PreTrainedModel:
    """The small model at random weights; seed torch first.

    Raises:
        TokenselError: an unknown kind.
    """
    check_names([kind], KINDS)
    classes = {
        "llava-next": LlavaNextForConditionalGeneration,
        "llava-onevision": LlavaOnevisionForConditionalGeneration,
    }
    model = classes[kind](build_config(kind))
    model.generation_config.pad_token_id = model.config.text_config.pad_token_id
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id
    model.generation_config.bos_token_id = model.config.text_config.bos_token_id
    return model
