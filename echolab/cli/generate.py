"""`echolab generate image=I audio=A out=V.mp4`: a talking video."""

from echolab.arguments import parse
from echolab.inference.options import GenerateArguments


def main(argv: list[str]) -> int:
    """Parse and check the arguments, then import torch and generate."""
    arguments = parse(GenerateArguments, argv, command="echolab generate")
    arguments.check()
    from echolab.inference.generate import generate_video

    return generate_video(arguments, argv)
