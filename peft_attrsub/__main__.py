"""python -m peft_attrsub: the same as the peft-attrsub command."""

from .cli import main

main()
