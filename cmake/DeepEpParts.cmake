# Finds the optional parts; says which are on and why the others are off.
find_package(Threads REQUIRED)
find_package(fmt REQUIRED)
