"""Small talk without a picture: the model says what it is, and that it is a demonstration."""

from __future__ import annotations

from random import Random

from .language import vary
from .questions import Made, Turn

WHO = (
    "我是火眼的小型演示模型，只用画出来的图训练过。",
    "I am the small demonstration model of huoyan, trained on drawings only.",
)
HELLO = ("你好！请给我看一张图片。", "Hello! Please show me a picture.")
CAN = (
    "我能描述简单的图画，说出颜色、数量和位置，读出短单词，还能比较图片和看视频。",
    "I can describe simple drawings, name colours, counts and places, read short words, "
    "compare pictures and watch videos.",
)
THANKS = ("不客气！", "You are welcome!")
BYE = ("再见！", "Goodbye!")
NOTHING = ("我没有看到图片，请给我一张图片。", "I see no picture. Please give me one.")

TALKS: tuple[tuple[tuple[str, str], tuple[str, ...], tuple[str, ...]], ...] = (
    (
        WHO,
        ("你是谁？", "你叫什么名字？", "介绍一下你自己。", "你是什么模型？", "你是什么？", "你是人吗？",
        "你是谁训练的？",
        "火眼是什么？"),
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself.",
        "Which model are you?", "What model is this?", "Are you a person?", "What is huoyan?"),
    ),
    (HELLO, ("你好", "你好！", "您好！", "嗨！", "早上好！", "晚上好！"), ("Hello", "Hello!", "Hi", "Hi!",
    "Hi there!",
    "Good morning!", "Hey!")),
    (
        CAN,
        ("你能做什么？", "你会什么？", "你可以做什么？", "你有什么功能？", "你能帮我做什么？", "怎么用你？"),
        ("What can you do?", "What are you able to do?", "How can you help me?", "What are you good at?",
        "What can I ask you?", "Help"),
    ),
    (THANKS, ("谢谢", "谢谢！", "谢谢你！", "多谢！"), ("Thanks", "Thank you.", "Thank you!",
    "Thanks a lot!")),
    (BYE, ("再见", "再见！", "拜拜！"), ("Goodbye", "Bye!", "See you!")),
    (
        NOTHING,
        ("请描述这张图片", "请描述这张图片。", "图中有什么？", "这是什么？", "图中有几辆汽车？",
        "图中写着什么？",
        "什么在移动？"),
        ("Describe this picture.", "What is in the picture?", "What is the content of this image?",
        "What is this?", "How many cars are there?", "What does the sign say?", "What moves?"),
    ),
)  # fmt: skip


def chat_example(dice: Random, split: str) -> Made:
    turns: list[Turn] = []
    for _ in range(3):
        answers, *questions = dice.choice(TALKS)
        k = dice.randrange(2)
        lang = ("zh", "en")[k]
        turns.append(("chat", lang, vary(dice.choice(questions[k]), lang, dice), answers[k]))
    return Made([], turns, [])
