from fastlora.cli.main import main

main()
