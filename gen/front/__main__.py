"""`python -m midway`: the command `midway`, also for launchers (`accelerate launch -m midway train latent ...`)."""

from midway.gen.commands.main import main

if __name__ == "__main__":
    main()
