"""Adapter files of PEFT, loralib, torchtune and diffusers: reading and writing them."""
