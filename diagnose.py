"""Why two figures differ: python diagnose.py A B --out report/"""

from sit_jax.cli import diagnose

if __name__ == "__main__":
    diagnose.main()
