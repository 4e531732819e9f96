"""`python -m sddns_tf`: the command `sddns`."""

from sddns_tf.cli.main import run

if __name__ == "__main__":
    run()
